"""Offscreen pictures: which OpenGL is used, whether it works, and one renderer per process and model.

MuJoCo's own `Renderer` makes a GL context per object and prints `EGLError` when one is collected at exit. Here a process
holds one GL context, one `MjrContext` per kind of model and size, and frees them in order at exit. Anti-aliasing, shadows and
reflections are off: on a CPU they cost 13 to 19 times the time of the picture.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import sys
from collections.abc import Hashable
from typing import Any

import numpy as np

from vla.errors import MachineError, UsageError

MAX_SIZE = 480
"""Largest side of a picture, in pixels."""
_MAX_GEOM = 2000
_INSTALL = {
    "egl": "apt-get install -y libegl1 libgl1-mesa-dri",
    "osmesa": "apt-get install -y libosmesa6",
}
_gl: tuple[int, Any] | None = None  # (pid, GLContext): a context does not survive a fork
_eyes: dict[tuple[int, Hashable, int], Eye] = {}


def choose_gl() -> str:
    """The value of MUJOCO_GL, set to `egl` or else `osmesa` when it was not; always before MuJoCo first looks at it.

    A machine without a display is assumed: a policy is trained on servers. Set MUJOCO_GL=glfw yourself to use a screen.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not chosen:
        chosen = "egl" if sys.platform != "linux" or _loads("libEGL.so.1") or not _loads("libOSMesa.so.8") else "osmesa"
        if sys.platform == "linux":
            os.environ["MUJOCO_GL"] = chosen
    return chosen


def check_renderer() -> str:
    """Draw nothing, once per process, and return the OpenGL backend that did it.

    Raises `MachineError` with the packages to install when no offscreen OpenGL works, or when MuJoCo is not installed.
    """
    _context()
    return os.environ.get("MUJOCO_GL", "default")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _context() -> Any:
    """This process's GL context, made current."""
    global _gl
    if _gl is not None and _gl[0] == os.getpid():
        return _gl[1]
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    first = choose_gl()
    # An automatic choice may fall back (libEGL without a driver is common); a user's own choice may not.
    tried = [first] if asked or first != "egl" else ["egl", "osmesa"]
    # A software rasteriser with threads is a third slower on a 64-pixel picture; cores are shared by processes instead.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    problems = []
    for backend in tried:
        try:
            context = _open(backend)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("mujoco", "OpenGL"):
                raise MachineError(
                    "offscreen renderer", found=f"Python package {error.name!r} is not installed",
                    expected="MuJoCo", fix="pip install 'tendon-vla[sim]'",
                ) from error  # fmt: skip
            raise
        except Exception as error:  # PyOpenGL and the drivers raise ImportError, AttributeError, RuntimeError, GLError, ...
            problems.append(f"{backend}: {type(error).__name__}: {error}".split("\n")[0])
            os.environ.pop("PYOPENGL_PLATFORM", None)
            continue
        os.environ["MUJOCO_GL"] = backend
        _gl = (os.getpid(), context)
        atexit.unregister(_close)
        atexit.register(_close)  # after MuJoCo registered the end of the display, hence run before it
        return context
    raise MachineError(
        "offscreen renderer", found="; ".join(problems), expected="EGL or OSMesa",
        fix=f"{_INSTALL.get(first, _INSTALL['egl'])}  (or: {_INSTALL['osmesa']} and export MUJOCO_GL=osmesa)",
    )  # fmt: skip


def _open(backend: str) -> Any:
    """A current GL context of `backend`."""
    module = f"mujoco.{backend}" if backend in ("egl", "osmesa", "glfw") else "mujoco.gl_context"
    context = importlib.import_module(module).GLContext(MAX_SIZE, MAX_SIZE)
    context.make_current()
    return context


class Eye:
    """A renderer of square pictures for every model with the same meshes and textures (`eye_for` shares it)."""

    def __init__(self, model: Any, size: int) -> None:
        import mujoco

        if not 8 <= size <= MAX_SIZE:
            raise UsageError("image size", found=size, expected=f"8 to {MAX_SIZE} pixels", fix="choose another size")
        self._mujoco = mujoco
        _context()
        kept = (model.vis.global_.offwidth, model.vis.global_.offheight, model.vis.quality.offsamples)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        model.vis.quality.offsamples = 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        model.vis.global_.offwidth, model.vis.global_.offheight, model.vis.quality.offsamples = kept
        self._scene = mujoco.MjvScene(model, _MAX_GEOM)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._raw = np.empty((size, size, 3), np.uint8)

    def picture(self, model: Any, data: Any, camera: int) -> np.ndarray:
        """(size, size, 3) uint8 RGB, upright, of `data` (already forwarded) through fixed camera number `camera`."""
        mujoco = self._mujoco
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._raw, None, self._rect, self._context)
        return np.ascontiguousarray(self._raw[::-1])  # OpenGL's first row is the lowest

    def free(self) -> None:
        """Give the OpenGL objects back; the context must still be alive."""
        self._context.free()


def eye_for(kind: Hashable, model: Any, size: int) -> Eye:
    """The process's renderer of `kind` (models that differ only in numbers share one) at `size` pixels."""
    key = (os.getpid(), kind, size)
    if key not in _eyes:
        _eyes[key] = Eye(model, size)
    return _eyes[key]


def _close() -> None:
    """Free in order and before Python tears modules down; a forked child leaves its parent's objects alone."""
    global _gl
    for (pid, _, _), eye in list(_eyes.items()):
        if pid == os.getpid():
            eye.free()
    _eyes.clear()
    if _gl is not None and _gl[0] == os.getpid():
        _gl[1].free()
    _gl = None
