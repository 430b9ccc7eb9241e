"""policy.onnx in fewer bits: the products with weights become integer products, what is small or delicate stays float32.

    dynamic        a product's inputs are measured while it runs; needs no data and follows whatever the robot sees
    static         ranges are fixed beforehand, on training windows; saves the measuring, clips what calibration never saw
    weight-only    weights in 8 bits by blocks (`weight-only-4`: in 4); small on disk, slower than whole products of bytes

Weights are signed bytes with one scale per output. Pictures are bytes already: a linear patch embedding multiplies them as they
are, without rounding anything but its weights. Convolutions stay float32: a tenth of the time. The integer products are
onnxruntime's own operators (com.microsoft), which every build of it has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla.errors import UsageError

KINDS = ("dynamic", "static", "weight-only", "weight-only-4")
DELICATE = ("head.", "l1_head.", "points.", "said.", "state_in.", "eye.tower.films.", "eye.learner.")
"""What is computed once per picture or per chunk, by the names of its weights: nothing to win, and the answer is read here."""
_BLOCK = 32
"""Inputs that share a scale in `weight-only`."""
_OURS = "com.microsoft"

Feed = dict[str, np.ndarray]
"""The inputs of policy.onnx."""


class Product(NamedTuple):
    """A product with constant weights."""

    node: Any
    weight: np.ndarray
    """(inputs, outputs)."""

    @property
    def name(self) -> str:
        return self.node.input[1]

    @property
    def bias(self) -> str:
        return self.node.input[2] if len(self.node.input) > 2 else ""


def quantise(source: Path, target: Path, kind: str, feeds: Sequence[Feed] = (), everything: bool = False) -> dict[str, Any]:
    """Write `target`, the graph `source` with products of `kind`; returns what was done, for parity.json.

    `feeds`: what to calibrate `static` on; `everything`: `DELICATE` products too. Raises `UsageError` for `static` without
    feeds and for an unknown kind.
    """
    import onnx
    from onnx import helper

    if kind not in KINDS:
        raise UsageError("--int8", found=repr(kind), expected=f"one of {', '.join(KINDS)}", fix="--int8 dynamic")
    if kind == "static" and not feeds:
        raise UsageError("--int8 static", found="no windows to calibrate on", expected="at least one",
                         fix="--calibrate DATASET, or --int8 dynamic")  # fmt: skip
    model = onnx.load(source)
    version = model.ir_version
    found = products(model)
    chosen = [p for p in found if everything or not p.name.startswith(DELICATE)]
    on_bytes = pictures(model, chosen)
    if kind.startswith("weight-only"):
        model, on_bytes = _weight_only(model, chosen, 4 if kind.endswith("4") else 8), {}
    else:
        ranges = _ranges(model, source, chosen, feeds) if kind == "static" else {}

        def write(product: Product) -> list[Any]:
            if (raw := on_bytes.get(product.name)) is not None:
                return _bytes(model, product, raw)
            return _static(model, product, ranges[product.node.input[0]]) if kind == "static" else _dynamic(model, product)

        _replace(model, chosen, write)
    if _OURS not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(_OURS, 1))
    model.ir_version, model.doc_string = version, ""
    del model.metadata_props[:]
    onnx.checker.check_model(model)
    onnx.save(model, target)
    return {"kind": kind, "products": [p.name for p in chosen], "on_bytes": len(on_bytes),
            "calibrated_on": len(feeds) if kind == "static" else 0,
            "float32": sorted({p.name.rpartition(".")[0] for p in found if p not in chosen})}  # fmt: skip


def products(model: Any) -> list[Product]:
    """Every Gemm and MatMul with constant weights."""
    from onnx import helper, numpy_helper

    constants, found = {i.name: i for i in model.graph.initializer}, []
    for node in model.graph.node:
        weight = constants.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if weight is None or len(weight.dims) != 2 or min(weight.dims) == 1:  # a vector is a weighted sum, exact and cheap
            continue
        flags = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if flags.get("alpha", 1.0) != 1.0 or flags.get("beta", 1.0) != 1.0 or flags.get("transA", 0):
            continue
        array = numpy_helper.to_array(weight)
        found.append(Product(node, np.ascontiguousarray(array.T) if flags.get("transB", 0) else array))
    return found


def symmetric(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) float32 -> signed bytes of that shape, and one scale per output (outputs,) float32."""
    scale = np.maximum(np.abs(weight).max(0), 1e-12).astype(np.float32) / 127
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def affine(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of unsigned bytes that hold low..high; zero is exact, for ReLU makes many of them."""
    low, high = min(low, 0.0), max(high, 0.0, low + 1e-6)
    scale = np.float32((high - low) / 255)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def pictures(model: Any, chosen: Sequence[Product]) -> dict[str, str]:
    """weights -> the bytes they multiply: a picture's, moved about and then cast to float32 for the product."""
    made = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for product in chosen:
        cast = made.get(product.node.input[0])
        if cast is None or cast.op_type != "Cast":
            continue
        name = cast.input[0]
        while name in made and made[name].op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten"):
            name = made[name].input[0]
        if name == "images":
            found[product.name] = cast.input[0]
    return found


def _keep(model: Any, **arrays: np.ndarray) -> list[str]:
    """Adds constants; returns their names."""
    from onnx import numpy_helper

    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    return list(arrays)


def _weights(model: Any, product: Product) -> list[str]:
    whole, scale = symmetric(product.weight)
    return _keep(model, **{f"{product.name}_int8": whole, f"{product.name}_scale": scale})


def _dynamic(model: Any, product: Product) -> list[Any]:
    from onnx import helper

    whole, scale = _weights(model, product)
    return [helper.make_node("DynamicQuantizeMatMul", [product.node.input[0], whole, scale, "", product.bias],
                             product.node.output, name=product.node.name, domain=_OURS)]  # fmt: skip


def _static(model: Any, product: Product, bounds: tuple[float, float]) -> list[Any]:
    from onnx import helper

    whole, scale = _weights(model, product)
    size, zero = affine(*bounds)
    own, at = _keep(model, **{f"{product.name}_in_scale": np.asarray(size), f"{product.name}_in_zero": np.asarray(zero)})
    rounded = f"{product.node.output[0]}_in"
    return [helper.make_node("QuantizeLinear", [product.node.input[0], own, at], [rounded], name=f"{product.node.name}_in"),
            helper.make_node("MatMulIntegerToFloat", [rounded, whole, own, scale, at, "", product.bias], product.node.output,
                             name=product.node.name, domain=_OURS)]  # fmt: skip


def _bytes(model: Any, product: Product, raw: str) -> list[Any]:
    from onnx import helper

    whole, scale = _weights(model, product)
    as_they_are = {f"{product.name}_in_scale": np.float32(1), f"{product.name}_in_zero": np.uint8(0)}
    one, zero = _keep(model, **{name: np.asarray(value) for name, value in as_they_are.items()})
    return [helper.make_node("MatMulIntegerToFloat", [raw, whole, one, scale, zero, "", product.bias], product.node.output,
                             name=product.node.name, domain=_OURS)]  # fmt: skip


def _replace(model: Any, chosen: Sequence[Product], write: Callable[[Product], list[Any]]) -> None:
    """Puts what `write` makes in the place of each product, and drops weights and casts nobody reads any more."""
    graph = model.graph
    by_name = {p.node.name: p for p in chosen}
    nodes = [new for node in graph.node for new in (write(by_name[node.name]) if node.name in by_name else [node])]
    while True:
        read = {name for node in nodes for name in node.input} | {out.name for out in graph.output}
        kept = [node for node in nodes if any(out in read for out in node.output)]
        if len(kept) == len(nodes):
            break
        nodes = kept
    constants = [i for i in graph.initializer if i.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def _ranges(model: Any, source: Path, chosen: Sequence[Product], feeds: Sequence[Feed]) -> dict[str, tuple[float, float]]:
    """tensor -> (low, high) over `feeds`, of every input of a chosen product."""
    names = list(dict.fromkeys(p.node.input[0] for p in chosen))
    session = _opened(source, names)
    seen = [[(float(a.min()), float(a.max())) for a in session.run(names, feed)] for feed in feeds]
    return {name: (min(row[i][0] for row in seen), max(row[i][1] for row in seen)) for i, name in enumerate(names)}


def input_shapes(source: Path, names: Sequence[str], feed: Feed) -> list[tuple[int, int, int]]:
    """(M, K, N) of the products in a float32 graph whose weights are `names`, in one run on `feed`."""
    import onnx

    chosen = [p for p in products(onnx.load(source)) if p.name in set(names)]
    inside = [p.node.input[0] for p in chosen]
    found = _opened(source, list(dict.fromkeys(inside))).run(inside, feed)
    return [(int(np.prod(a.shape[:-1])), p.weight.shape[0], p.weight.shape[1]) for a, p in zip(found, chosen, strict=True)]


def _opened(source: Path, names: Sequence[str]) -> Any:
    """A session of a graph that also says what these tensors inside it are."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    model = onnx.load(source)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _weight_only(model: Any, chosen: Sequence[Product], bits: int) -> Any:
    """By onnxruntime's own tool, which knows how its blocks are packed."""
    from onnx import helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    constants = {i.name: i for i in model.graph.initializer}

    def as_matmul(product: Product) -> list[Any]:
        constants[product.name].CopyFrom(numpy_helper.from_array(product.weight, product.name))
        node, out = product.node, product.node.output[0]
        product_out = f"{out}_product" if product.bias else out
        made = [helper.make_node("MatMul", node.input[:2], [product_out], name=f"{node.name}_product")]
        return made + ([helper.make_node("Add", [product_out, product.bias], [out], name=node.name)] if product.bias else [])

    _replace(model, chosen, as_matmul)
    del model.graph.value_info[:]  # shapes of turned weights are among what was known
    wanted = {f"{p.node.name}_product" for p in chosen}
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in wanted]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=4,
                                             nodes_to_exclude=others)  # fmt: skip
            quantizer.process()
    finally:
        logging.disable(level)
    done: Any = quantizer.model
    return done.model
