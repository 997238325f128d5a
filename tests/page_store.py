"""What vLLM's OffloadingConnector keeps pages in on its CPU build, whose own store is for GPUs: copies of their bytes."""

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class Copies(OffloadingWorker):
    def __init__(self, tensors: list[torch.Tensor], pages: int):
        self.served = [tensor.view(torch.uint8).flatten(1) for tensor in tensors]
        self.kept = [torch.zeros(pages, x.shape[1], dtype=torch.uint8) for x in self.served]
        self.done: list[TransferResult] = []

    def submit_store(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, self.served, src_spec, self.kept, dst_spec)

    def submit_load(self, job_id, src_spec, dst_spec):
        return self._copy(job_id, self.kept, src_spec, self.served, dst_spec)

    def _copy(self, job_id, sources, src_spec, targets, dst_spec):
        for source, target in zip(sources, targets):
            target[torch.from_numpy(dst_spec.block_ids).long()] = source[torch.from_numpy(src_spec.block_ids).long()]
        self.done.append(TransferResult(job_id, True))
        return True

    def get_finished(self):
        done, self.done = self.done, []
        return done

    def wait(self, job_ids):
        """Copies are made at once."""


class PageStore(CPUOffloadingSpec):
    def get_worker(self, kv_caches):
        return Copies([part.tensor for part in kv_caches.tensors], self.num_chunks)
