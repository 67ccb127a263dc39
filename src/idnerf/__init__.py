"""idnerf: two or three posed photos in; novel views, depth and video out."""

__version__ = "0.1.0"
