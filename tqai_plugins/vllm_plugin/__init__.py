"""vLLM plugin: `vllm serve MODEL --kv-cache-dtype tqai`. Found through the entry point vllm.general_plugins."""

from __future__ import annotations

_registered = False


def _prepare_keys(model, config) -> None:
    from . import key_mean  # only a worker loads a model

    key_mean.learn(model, config)


def register() -> None:
    """Teach this process' vLLM the tqai cache dtypes. Called in every process, perhaps more than once.

    Nothing changes for other dtypes: the backend is used by layers whose cache dtype is a tqai name.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from . import compat, metrics, start_checks

    reason = compat.why_unsupported()
    compat.check_at_start(start_checks.name_check(reason), start_checks.check)
    if reason:
        return
    compat.register_dtypes()
    compat.register_backend()
    compat.register_folders()
    compat.after_loading(_prepare_keys)
    metrics.show()
