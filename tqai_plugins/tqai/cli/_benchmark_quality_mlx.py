"""`tqai benchmark quality --backend mlx`: the same table through the caches of mlx-lm's generators and server."""

from __future__ import annotations

import sys
import time

from .benchmark_quality import DEFAULT_FORMATS, Entry, machine, plot, read_text, show, split_windows


def run(args) -> int:
    """args: as benchmark_quality has them. --chunk does not count here: tokens see the same however they are cut."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np
    from tqai import models

    from tqai_plugins.core import key_mean_file
    from tqai_plugins.mlx_lm_plugin import CacheOptions, fidelity, key_means

    from . import emit, keep

    entries = [Entry.parse(text, args) for text in (args.formats or DEFAULT_FORMATS).split(",")]
    options = [CacheOptions.of(**entry.options) for entry in entries]  # refuse before the model is loaded
    context, windows = args.context or (2048 if args.text else 512), args.windows or (4 if args.text else 2)
    folder, extra = models._locate(args.model)
    if extra:
        raise ValueError(f"mlx-lm reads model folders and Hugging Face ids; {args.model} is a GGUF file")
    model, tokenizer = mlx_lm.load(folder)
    model.set_dtype(getattr(mx, args.dtype))
    tokens = split_windows(np.array(tokenizer.encode(read_text(args.text))), context, windows)
    head = {
        "model": args.model, "text": args.text.name if args.text else "built-in", "runtime": "mlx", "context": context,
        "dtype": args.dtype, "machine": machine("mlx", "mlx-lm"),
    }  # fmt: skip
    start = time.perf_counter()
    means = (key_mean_file.read(folder) or key_means.learn(model, tokenizer)) if any(entry.mean for entry in entries) else None
    given = {entry.name: entry.options | {"key_means": means if entry.mean else None} for entry in entries}
    for index, rows in enumerate(fidelity.measure(model, tokens, given)):
        data = head | {"windows": index + 1, "seconds": time.perf_counter() - start, "rows": rows}
        keep(args, data)
    emit(args, data, lambda: show(data))
    if args.plot:
        plot(data, args.plot)
    unread = [e.name for e, o in zip(entries, options) if o.window + o.sinks >= context - 1]
    if unread:
        message = f"tqai: the compressed cache was never read ({', '.join(unread)}): the window covers the context"
        print(message, file=sys.stderr)
    return 1 if unread else 0
