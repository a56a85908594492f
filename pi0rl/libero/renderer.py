"""`python -m pi0rl.libero.renderer` prints what renders here.

Whoever asks starts it as a process of its own: a GL context cannot be unmade.
"""

from __future__ import annotations

import ctypes
import sys

from pi0rl.errors import UserError
from pi0rl.libero.gl import create_context

_GL_RENDERER, _GL_VERSION = 0x1F01, 0x1F02


def renderer() -> str:
    """Back end, renderer and version of OpenGL, e.g. ``osmesa: llvmpipe (LLVM 15.0.6, 256 bits), 4.5 ...``.

    Raises:
        UserError: no back end works.
    """
    context = create_context()
    if context.backend == "egl":
        address_of = ctypes.CDLL("libEGL.so.1").eglGetProcAddress
    else:
        address_of = ctypes.CDLL(None).OSMesaGetProcAddress  # create_context has made its symbols global
    address_of.restype = ctypes.c_void_p
    get_string = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_uint)(address_of(b"glGetString"))
    told = [(get_string(name) or b"").decode(errors="replace") for name in (_GL_RENDERER, _GL_VERSION)]
    return f"{context.backend}: {', '.join(told)}"


if __name__ == "__main__":
    try:
        print(renderer())
    except UserError as error:
        sys.exit(str(error))
