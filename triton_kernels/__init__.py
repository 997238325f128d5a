"""Triton kernels over compressed pages: one module an operation, kernel and launcher side by side."""

if __name__ == "triton_kernels":
    # vLLM takes any top-level `triton_kernels` for OpenAI's MoE kernels, even this folder.
    raise ImportError("tqai's kernels are imported as tqai_plugins.triton_kernels")
