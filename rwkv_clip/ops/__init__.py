"""The operators: WKV6 and the element-wise steps around it.

Importing this loads the compiled library if it was built, and never builds it.
"""

from rwkv_clip.ops import _library, operator
from rwkv_clip.ops._library import BuildInfo, build_info
from rwkv_clip.ops.operator import wkv6

_library.load()
operator.register()

__all__ = ["BuildInfo", "build_info", "wkv6"]
