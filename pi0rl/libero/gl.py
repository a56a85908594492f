"""OpenGL contexts without a display: EGL on a GPU or in software, or OSMesa.

The context is made through ctypes, so a back end that fails can be followed by the next one in the same process and
nothing depends on which back end `mujoco` chose when it was imported. `MUJOCO_GL=egl|osmesa` forces one; where only the
wheel `lavavu-osmesa` provides OSMesa leave it unset, since `import mujoco` would look for a system library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pi0rl.errors import UserError

BACKENDS = ("egl", "osmesa")

# Names and values of the EGL 1.5 registry (https://registry.khronos.org/EGL).
_EGL_PLATFORM_DEVICE_EXT = 0x313F
_EGL_CUDA_DEVICE_NV = 0x323A
_EGL_EXTENSIONS = 0x3055
_EGL_OPENGL_API = 0x30A2
_EGL_NONE = 0x3038
_EGL_DRAW, _EGL_READ = 0x3059, 0x305A
_EGL_CONFIG = (
    *(0x3024, 8, 0x3023, 8, 0x3022, 8, 0x3021, 8),  # red, green, blue, alpha bits
    *(0x3025, 24, 0x3026, 8),  # depth, stencil bits
    *(0x3033, 0x0001),  # surface type: pbuffer
    *(0x3040, 0x0008),  # renderable type: OpenGL
    _EGL_NONE,
)
_OSMESA_RGBA, _GL_UNSIGNED_BYTE = 0x1908, 0x1401


class BackendError(Exception):
    """A back end does not work here; the message says why."""


# Puts back what was current before.
Restore = Callable[[], object]


@dataclass(frozen=True)
class GLContext:
    """An OpenGL context for one thread; it lives as long as the process.

    Attributes:
        backend: "egl" or "osmesa".
        device: What renders, e.g. "EGL device 0 (CUDA 0)" or the path of the OSMesa library.
        switch: Makes it current; raises `BackendError` where it is another thread's.
    """

    backend: str
    device: str
    switch: Callable[[], Restore]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it current for a while, and then again what was current before, if anything was.

        LIBERO's own environments make their context current once and rely on its staying so.

        Raises:
            UserError: It is current in another thread.
        """
        try:
            restore = self.switch()
        except BackendError as error:
            raise UserError(f"{self.device}: {error}; render in one thread per process") from None
        try:
            yield
        finally:
            restore()


def create_context() -> GLContext:
    """Make an OpenGL context with the back end that `MUJOCO_GL` names, else EGL, else OSMesa.

    It is current afterwards, unless another one is.

    Raises:
        UserError: No back end works; the message says why each failed and what to install.
    """
    reasons = []
    for backend in requested_backends():
        try:
            return create_backend_context(backend)
        except BackendError as error:
            reasons.append(f"{backend}: {error}")
    raise UserError(
        f"no OpenGL back end works ({'; '.join(reasons)}): install libegl1 and libgl1-mesa-dri (EGL) "
        "or libosmesa6, or without root `pip install lavavu-osmesa`; `pi0rl doctor` tries them all"
    )


def create_backend_context(backend: str) -> GLContext:
    """Make an OpenGL context with one of `BACKENDS`; it is current afterwards, unless another one is.

    Raises:
        BackendError: It does not work here.
    """
    # Mesa's rasteriser would start a thread per core in every process; frames of 64 to 256 px gain nothing from it, and
    # handing them over to even one thread costs a tenth of a small frame's time.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return _CREATE[backend]()


def prefer_gpu(gpu: int) -> None:
    """Let this process render on the GPU that CUDA counts as `gpu` among those visible to it.

    To be called before the first picture. Without such a GPU nothing changes; `MUJOCO_EGL_DEVICE_ID` has precedence.
    """
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if gpu < len(visible) else str(gpu)


def requested_backends() -> tuple[str, ...]:
    """What may be used here, in the order it is tried; raises UserError where `MUJOCO_GL` is no back end."""
    requested = os.environ.get("PI0RL_GL", "").strip().lower()  # the user's MUJOCO_GL, see __init__.py
    if requested in ("", "on", "true", "1", "enable", "enabled"):
        return BACKENDS
    if requested not in BACKENDS:
        raise UserError(f"MUJOCO_GL={requested}: expected egl or osmesa (or unset, to try both)")
    return (requested,)


def _create_egl() -> GLContext:
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        raise BackendError(f"libEGL.so.1 cannot be loaded ({error})") from error
    for name in ("GetProcAddress", "CreateContext", "GetCurrentContext", "GetCurrentDisplay", "GetCurrentSurface"):
        getattr(egl, f"egl{name}").restype = ctypes.c_void_p
    failures = []
    for index, device in _egl_devices(egl):
        cuda = _cuda_index(egl, device)
        name = f"EGL device {index} ({'software or non-CUDA' if cuda is None else f'CUDA {cuda}'})"
        try:
            switch = _egl_context(egl, device)
        except BackendError as error:
            failures.append(f"{name}: {error}")
            continue
        # MuJoCo looks its GL functions up among the global symbols, EGL's first: only a library that works goes there.
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
        return GLContext("egl", name, switch)
    raise BackendError("; ".join(failures) or "EGL lists no device")


def _egl_context(egl: ctypes.CDLL, device: int) -> Callable[[], Restore]:
    get_display = _egl_function(
        egl, "eglGetPlatformDisplayEXT", ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )
    display = ctypes.c_void_p(get_display(_EGL_PLATFORM_DEVICE_EXT, device, None))
    if not display or not egl.eglInitialize(display, None, None):
        raise BackendError("the display cannot be initialised (no driver, or no permission on /dev/dri)")
    config, count = ctypes.c_void_p(), ctypes.c_int()
    attributes = (ctypes.c_int * len(_EGL_CONFIG))(*_EGL_CONFIG)
    if not egl.eglChooseConfig(display, attributes, ctypes.byref(config), 1, ctypes.byref(count)) or count.value < 1:
        raise BackendError("no 8-bit RGBA configuration with 24-bit depth")
    egl.eglBindAPI(_EGL_OPENGL_API)
    context = ctypes.c_void_p(egl.eglCreateContext(display, config, None, None))
    if not context:
        raise BackendError("an OpenGL context cannot be made")
    switch = partial(_switch_egl, egl, display, context)
    switch()()
    return switch


def _switch_egl(egl: ctypes.CDLL, display: ctypes.c_void_p, context: ctypes.c_void_p) -> Restore:
    before = egl.eglGetCurrentContext()
    if before == context.value:
        return _leave
    surfaces = [ctypes.c_void_p(egl.eglGetCurrentSurface(which)) for which in (_EGL_DRAW, _EGL_READ)]
    place = (ctypes.c_void_p(egl.eglGetCurrentDisplay()), *surfaces, ctypes.c_void_p(before))
    if not egl.eglMakeCurrent(display, None, None, context):
        raise BackendError("the OpenGL context cannot be made current")
    return partial(egl.eglMakeCurrent, *place) if before else _leave


def _leave() -> None:
    """Nothing was current before, or this context was: it may stay."""


def _egl_devices(egl: ctypes.CDLL) -> list[tuple[int, int]]:
    """(index, handle) of the devices to try, the preferred ones first.

    `MUJOCO_EGL_DEVICE_ID` picks one by its EGL index. Otherwise devices that `CUDA_VISIBLE_DEVICES` names come first;
    where it is empty (as Ray sets it for workers without a GPU), devices that are no CUDA device come first.
    """
    query = _egl_function(
        egl, "eglQueryDevicesEXT", ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )
    handles, count = (ctypes.c_void_p * 64)(), ctypes.c_int()
    if not query(64, handles, ctypes.byref(count)):
        raise BackendError("eglQueryDevicesEXT failed")
    devices = [(index, handle) for index, handle in enumerate(handles[: count.value]) if handle]
    chosen = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if chosen is not None:
        if not chosen.isdigit() or int(chosen) >= len(devices):
            raise UserError(f"MUJOCO_EGL_DEVICE_ID={chosen}: expected 0 to {len(devices) - 1}, EGL's own numbering")
        return [devices[int(chosen)]]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    wanted = {int(entry) for entry in visible.split(",") if entry.strip().isdigit()}
    cuda = {index: _cuda_index(egl, handle) for index, handle in devices}
    if not wanted and visible.strip() not in ("", "-1"):  # UUIDs: EGL does not know them
        return devices
    return sorted(devices, key=lambda device: not (cuda[device[0]] in wanted if wanted else cuda[device[0]] is None))


def _cuda_index(egl: ctypes.CDLL, device: int) -> int | None:
    query_string = _egl_function(egl, "eglQueryDeviceStringEXT", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    if b"EGL_NV_device_cuda" not in (query_string(device, _EGL_EXTENSIONS) or b""):
        return None
    query = _egl_function(
        egl,
        "eglQueryDeviceAttribEXT",
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_ssize_t),
    )
    index = ctypes.c_ssize_t()
    return index.value if query(device, _EGL_CUDA_DEVICE_NV, ctypes.byref(index)) else None


def _egl_function(egl: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    address = egl.eglGetProcAddress(name.encode())
    if not address:
        raise BackendError(f"this EGL has no {name}")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def _create_osmesa() -> GLContext:
    library, path = _load_osmesa()
    library.OSMesaCreateContextExt.restype = library.OSMesaGetCurrentContext.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.OSMesaCreateContextExt(_OSMESA_RGBA, 24, 8, 0, None))
    # MuJoCo draws into a framebuffer of its own; OSMesa only needs some window buffer.
    width = height = 16
    buffer = (ctypes.c_ubyte * (4 * width * height))()
    if not context:
        raise BackendError(f"{path}: a context cannot be made")
    switch = partial(_switch_osmesa, library, context, buffer, width, height)
    switch()()
    return GLContext("osmesa", path, switch)


def _switch_osmesa(
    library: ctypes.CDLL, context: ctypes.c_void_p, buffer: ctypes.Array[Any], width: int, height: int
) -> Restore:
    before = library.OSMesaGetCurrentContext()
    if before == context.value:
        return _leave
    size, theirs = [ctypes.c_int() for _ in range(3)], ctypes.c_void_p()
    if before:
        fields = (*map(ctypes.byref, size), ctypes.byref(theirs))
        library.OSMesaGetColorBuffer(ctypes.c_void_p(before), *fields)
    if not library.OSMesaMakeCurrent(context, buffer, _GL_UNSIGNED_BYTE, width, height):
        raise BackendError("the OpenGL context cannot be made current")
    place = (ctypes.c_void_p(before), theirs, _GL_UNSIGNED_BYTE, size[0], size[1])
    return partial(library.OSMesaMakeCurrent, *place) if before else _leave


def _load_osmesa() -> tuple[ctypes.CDLL, str]:
    reasons = []
    for name in dict.fromkeys((ctypes.util.find_library("OSMesa"), "libOSMesa.so.8", "libOSMesa.so.6")):
        try:
            if name is not None:
                return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), name
        except OSError as error:
            reasons.append(str(error))
    bundled = _wheel_libraries()
    path = next((str(path) for path in bundled if path.name.startswith("libOSMesa")), None)
    if path is None:
        raise BackendError(f"no libOSMesa ({'; '.join(reasons)}; the wheel lavavu-osmesa is not installed)")
    # The wheel's libraries do not know their own folder: load what libOSMesa needs first, dependencies before users.
    waiting = [other for other in bundled if str(other) != path]
    while waiting:
        failed = [other for other in waiting if not _loads(other)]
        if len(failed) == len(waiting):
            break
        waiting = failed
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), path
    except OSError as error:
        raise BackendError(str(error)) from error


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _wheel_libraries() -> list[Path]:
    """The libraries that the wheel `lavavu-osmesa` bundles, where that is installed."""
    try:
        files = importlib.metadata.files("lavavu-osmesa") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.parts[0] == "lavavu_osmesa.libs"]


_CREATE: dict[str, Callable[[], GLContext]] = {"egl": _create_egl, "osmesa": _create_osmesa}
