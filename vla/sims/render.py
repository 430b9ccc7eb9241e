"""Offscreen pictures: which OpenGL is used, whether it works, and one renderer per process and model.

MuJoCo's own `Renderer` makes a GL context per object and prints `EGLError` when one is collected at exit. Here a
process holds one GL context, one `MjrContext` per kind of model and size, and frees them in order at exit.
Anti-aliasing, shadows and reflections are off: on a CPU they cost 13 to 19 times the time of the picture.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.errors import MachineError, UsageError

MAX_SIZE = 480
"""Largest side of a picture, in pixels."""
_MAX_GEOM = 2000
_gl: tuple[int, Any] | None = None  # (pid, GLContext): a context does not survive a fork
_turn, _shared = threading.RLock(), False
_eyes: dict[tuple[int, Hashable, int], Eye] = {}


def choose_gl() -> str:
    """The value of MUJOCO_GL, set to `egl` where it starts or else to `osmesa` when it was not set.

    A machine without a display is assumed: a policy is trained on servers. Set MUJOCO_GL=glfw yourself to use a screen.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not chosen and sys.platform == "linux":
        chosen = "egl" if _egl_starts() else "osmesa"
        os.environ["MUJOCO_GL"] = chosen
    return chosen


def check_renderer() -> str:
    """Draw one picture, once per process, and return the OpenGL backend that did it.

    Raises `MachineError` with the packages to install when no offscreen OpenGL works, when MuJoCo is not installed, or
    in a process that was forked after its parent drew.
    """
    backend = choose_gl()
    try:
        mujoco: Any = importlib.import_module("mujoco")
        if not any(pid == os.getpid() for pid, _, _ in _eyes):
            model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><camera pos='0 0 1'/></worldbody></mujoco>")
            data = mujoco.MjData(model)
            mujoco.mj_forward(model, data)
            eye_for("check", model, 8).picture(model, data, 0)
    except ModuleNotFoundError as error:
        raise MachineError("offscreen renderer", found=f"Python package {error.name!r} is not installed",
                           expected="MuJoCo", fix="pip install 'tendon-vla[sim]'") from error  # fmt: skip
    except MachineError:
        raise
    except Exception as error:  # PyOpenGL, MuJoCo and drivers: ImportError, AttributeError, FatalError, GLError, ...
        raise MachineError(
            f"offscreen renderer, MUJOCO_GL={backend}", found=f"{type(error).__name__}: {error}".split("\n")[0],
            expected="EGL or OSMesa that can draw",
            fix="apt-get install -y libegl1 libgl1-mesa-dri, then MUJOCO_GL=egl; "
            "or apt-get install -y libosmesa6, then MUJOCO_GL=osmesa",
        ) from error  # fmt: skip
    return backend


def _egl_starts() -> bool:
    """Whether EGL has a device that starts. The library without a driver is common, and PyOpenGL cannot change its mind
    once it has loaded EGL, so the question is put to the library itself (EGL_EXT_platform_device)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    found = [egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")]
    if not all(found):
        return False
    void, many = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, many, ctypes.POINTER(ctypes.c_int))(found[0])
    display = ctypes.CFUNCTYPE(void, ctypes.c_uint, void, void)(found[1])
    devices, count = (void * 16)(), ctypes.c_int()
    platform_device = 0x313F
    return bool(query(16, devices, ctypes.byref(count))) and any(
        egl.eglInitialize(display(platform_device, devices[i], None), None, None) for i in range(count.value)
    )


def _context() -> Any:
    """This process's GL context, made at the first call and current from then on; see `draw_in_any_thread`."""
    global _gl
    if _gl is not None and _gl[0] == os.getpid():
        if _shared:
            _gl[1].make_current()
        return _gl[1]
    if _gl is not None:
        raise MachineError("offscreen renderer", found="a process forked after its parent drew",
                           expected="a process of its own: OpenGL does not survive a fork",
                           fix="start workers with multiprocessing.get_context('spawn')")  # fmt: skip
    # A software rasteriser with threads is a third slower on a 64-pixel picture; cores are shared by processes instead.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    backend = choose_gl()
    module = f"mujoco.{backend}" if backend in ("egl", "osmesa", "glfw") else "mujoco.gl_context"
    kind = importlib.import_module(module).GLContext
    kind._context = None  # read by __del__ even when __init__ failed: would print a second error over the first
    context = kind(MAX_SIZE, MAX_SIZE)
    context.make_current()
    _gl = (os.getpid(), context)
    atexit.register(_close)  # after MuJoCo registered the end of the display, hence run before it
    return context


def draw_in_any_thread() -> None:
    """From now on this process may draw in any thread, one at a time, for about a fifteenth of a small picture's time. Called in
    the thread that drew so far, if one did: a context belongs to a thread until it is let go, and elsewhere OpenGL does nothing
    and says nothing."""
    global _shared
    with _drawing():
        _shared = True


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """The context is current here."""
    with _turn:
        _context()
        try:
            yield
        finally:
            if _shared and "mujoco.egl" in sys.modules:  # OSMesa lets itself be taken
                egl: Any = sys.modules["mujoco.egl"]
                nothing = egl.EGL.EGL_NO_SURFACE
                egl.EGL.eglMakeCurrent(egl.EGL_DISPLAY, nothing, nothing, egl.EGL.EGL_NO_CONTEXT)


@dataclass(frozen=True)
class View:
    """A camera that no model file has: it stands `distance` metres from `lookat` and looks at it; angles in degrees."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    """Direction of looking, about z from +x: 0 looks along +x, 90 along +y."""
    elevation: float
    """Negative looks down."""


class Eye:
    """A renderer of square pictures for every model with the same meshes and textures (`eye_for` shares it)."""

    def __init__(self, model: Any, size: int) -> None:
        mujoco: Any = importlib.import_module("mujoco")
        if not 8 <= size <= MAX_SIZE:
            raise UsageError("image size", found=size, expected=f"8 to {MAX_SIZE} pixels", fix="choose another size")
        self._mujoco = mujoco
        kept = (model.vis.global_.offwidth, model.vis.global_.offheight, model.vis.quality.offsamples)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        model.vis.quality.offsamples = 0
        with _drawing():
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        model.vis.global_.offwidth, model.vis.global_.offheight, model.vis.quality.offsamples = kept
        self._scene = mujoco.MjvScene(model, _MAX_GEOM)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._raw = np.empty((size, size, 3), np.uint8)

    def picture(self, model: Any, data: Any, camera: int | View) -> np.ndarray:
        """(size, size, 3) uint8 RGB, upright, of `data` (already forwarded) through the model's `camera` or a view of ours."""
        with _drawing():
            return self._picture(model, data, camera)

    def _picture(self, model: Any, data: Any, camera: int | View) -> np.ndarray:
        mujoco = self._mujoco
        if isinstance(camera, View):
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
            self._camera.lookat[:], self._camera.distance = camera.lookat, camera.distance
            self._camera.azimuth, self._camera.elevation = camera.azimuth, camera.elevation
        else:
            self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(self._raw, None, self._rect, self._context)
        return np.ascontiguousarray(self._raw[::-1])  # OpenGL's first row is the lowest

    def free(self) -> None:
        """Give the OpenGL objects back; the context must still be alive."""
        with _drawing():
            self._context.free()


def eye_for(kind: Hashable, model: Any, size: int, hide: int | None = None) -> Eye:
    """The process's renderer of `kind` (models that differ only in numbers share one) at `size` pixels.

    `hide` is a group of geoms that is not drawn, such as the shapes behind the meshes.
    """
    key = (os.getpid(), kind, size)
    if key not in _eyes:
        _eyes[key] = Eye(model, size)
        if hide is not None:
            _eyes[key]._option.geomgroup[hide] = 0
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
