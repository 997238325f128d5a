"""`tqai mlx enable | disable | status`: compressed caches in the plain mlx_lm commands of this Python environment."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "mlx", help="let the plain mlx_lm.server, mlx_lm.generate ... of this environment use tqai's cache, or not"
    )
    parser.add_argument("action", choices=("enable", "disable", "status"))
    parser.add_argument("--kv-cache-dtype", default="tqai", help="tqai (4 and 2 bits) or tqai_k<bits>v<bits>")
    return parser


def run(args) -> int:
    from tqai_plugins.mlx_lm_plugin import autoload

    file = Path(sysconfig.get_path("purelib")) / autoload.FILE
    if args.action == "enable":
        _check(args.kv_cache_dtype)
        file.write_text(autoload.line(args.kv_cache_dtype))
    elif args.action == "disable":
        file.unlink(missing_ok=True)
    if file.exists():
        name = file.read_text().split("arm('")[-1].split("'")[0]
        print(f"enabled: mlx_lm commands of this environment use {name} ({file})")
        if os.environ.get(autoload.VARIABLE):
            print(f"but {autoload.VARIABLE}={os.environ[autoload.VARIABLE]} is set, which goes before")
    else:
        print(f"disabled: mlx_lm commands use their own cache (no {file})")
    return 0


def _check(name: str) -> None:
    from tqai_plugins.core.kv_format import SERVED_NAMES, parse_name

    parse_name(name)
    if name not in SERVED_NAMES:
        raise ValueError(f"--kv-cache-dtype is {name!r}; mlx-lm serves widths of 2, 3, 4 and 8 bits")
