"""Random schedules of requests on the real vLLM CPU engine: whatever runs beside a request, its answer is the one it
would get alone.

The model is one whose answers are known beforehand (follower_model.py) and each word of which needs one place of the
cache, so that every answer is compared with what it has to be. It wins by far: what a chunk, a copy of a recent page, a
recomputation after preemption or a batch of another size rounds does not turn it. (SmolLM2's text would: where two words
are almost as likely, a difference of 1e-7 flips the rounding of a code, and layers make more of it.)
TQAI_OPERATIONS=100000 runs about so many new operations: arrivals, departures and steps.
"""

import dataclasses
import gc
import os
import random
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM; .ci/run vllm installs its CPU build")

import follower_model
from hypothesis import given
from hypothesis import strategies as st
from operations import done, sized

from tqai_plugins.core.kv_format import KVFormat

LONGEST = 400  # tokens of a request, answer included
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# Of the smallest caches the second request preempts the first. Blocks of 32 tokens have no 8-bit copies of recent pages.
ENGINES = {
    "copies": {"kv_cache_dtype": "tqai", "block_size": 64, "max_num_batched_tokens": 128},
    "small blocks": {"kv_cache_dtype": "tqai_k4v4", "block_size": 32, "max_num_batched_tokens": 48},
    "speculation": {"kv_cache_dtype": "tqai_k3v3", "block_size": 64, "max_num_batched_tokens": 256, "speculative_config": NGRAM},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """It arrives so many steps after the one before it; of its prompt the first tokens may be those of another's."""

    steps: int
    length: int
    shared: int
    answered: int
    leaves_after: int | None

    def prompt(self, source: random.Random, shared: list[int]) -> list[int]:
        return follower_model.draw(source, self.length, shared[: min(self.shared, self.length - 3)])


REQUESTS = st.builds(
    Request, steps=st.integers(0, 5), length=st.one_of(st.integers(4, 70), st.integers(4, LONGEST - 24)),
    shared=st.sampled_from([0, 40, 130, 300]), answered=st.integers(1, 24),
    leaves_after=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
)  # fmt: skip


class Engine:
    """The engine in this process, and what its schedules came to."""

    def __init__(self, folder, options: dict):
        from vllm import EngineArgs, LLMEngine

        fmt = KVFormat.from_name(options["kv_cache_dtype"], follower_model.HEAD_DIM)
        token_bytes = follower_model.LAYERS * follower_model.KV_HEADS * fmt.slot_bytes
        blocks = -(-LONGEST // options["block_size"]) + 3  # vLLM keeps one
        self.engine = LLMEngine.from_engine_args(EngineArgs(
            model=str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False,
            max_model_len=LONGEST, max_num_seqs=6, kv_cache_memory_bytes=blocks * options["block_size"] * token_bytes,
            additional_config={"tqai": {"recent_memory": 0.5}}, **options,
        ))  # fmt: skip
        self.requests = self.cut_short = 0

    def metric(self, name: str) -> float:
        return next(x.value for x in self.engine.get_metrics() if x.name == name)

    def run(self, requests: list[Request], seed: int) -> None:
        """Have them served; every answer has to be the known one, and no block may stay in use."""
        from vllm import SamplingParams

        source = random.Random(seed)
        shared = follower_model.draw(source, LONGEST)[1:-1]
        waiting, expected, said, leaves, step, due = list(requests), {}, {}, {}, 0, 0
        done["vLLM's engine"] += len(requests)
        while waiting or self.engine.has_unfinished_requests():
            while waiting and step >= due + waiting[0].steps:
                request, due = waiting.pop(0), step
                name = str(self.requests)
                prompt = request.prompt(source, shared)
                options = SamplingParams(temperature=0, max_tokens=request.answered, ignore_eos=True, detokenize=False)
                self.engine.add_request(name, {"prompt_token_ids": prompt}, options)
                expected[name], said[name] = follower_model.answer(prompt, request.answered), []
                if request.leaves_after is not None:
                    leaves[name] = step + request.leaves_after
                self.requests += 1
            for output in self.engine.step():
                said[output.request_id] = list(output.outputs[0].token_ids)
            for name in [name for name, when in leaves.items() if when <= step]:
                del leaves[name]
                if len(said[name]) < len(expected[name]):
                    self.engine.abort_request([name])
                    expected[name] = expected[name][: len(said[name])]
                    self.cut_short += 1
                    done["vLLM's engine"] += 1
            step += 1
            done["vLLM's engine"] += 1
            assert step < 5000, "no end"
        assert said == expected
        assert self.engine.engine_core.engine_core.scheduler.kv_cache_manager.usage == 0


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    options = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name, value)
        made = Engine(follower_model.write(tmp_path_factory.mktemp("follower")), ENGINES[request.param])
        yield made
        made.engine.engine_core.shutdown()
        del made
        gc.collect()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


@sized(1 / 60 / len(ENGINES), 25)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=8), seed=st.integers(0, 2**31), forget=st.booleans())
def test_every_answer_is_the_one_of_the_request_alone(engine, requests, seed, forget):
    if forget:
        engine.engine.reset_prefix_cache()
    engine.run(requests, seed)


def test_a_crowd_is_preempted_shares_prefixes_and_is_answered_right(engine):
    """The same schedule each time, in which all that a schedule can bring about does come about."""
    crowd = [Request(1, 100 + 40 * i % 220, 130, 24, 5 if i == 3 else None) for i in range(8)]
    engine.run(crowd, 1)
    print(f"{engine.requests} requests, {engine.cut_short} cut short")
    assert engine.metric("vllm:num_preemptions") > 0 < engine.metric("vllm:prefix_cache_hits") and engine.cut_short
    if engine.engine.vllm_config.speculative_config:
        drafted, accepted = (engine.metric(f"vllm:spec_decode_num_{what}_tokens") for what in ("draft", "accepted"))
        assert 0.1 * drafted < accepted < 0.9 * drafted


def test_hundreds_of_requests_leave_no_memory_behind(engine):
    if engine.engine.vllm_config.speculative_config:
        pytest.skip("when it speculates vLLM's own memory grows for some hundred requests, with the stock cache by as much")
    held = []
    for seed in range(5):
        engine.run([Request(0, 4 + i % 60, 0, 2, None) for i in range(100)], seed)
        gc.collect()
        held.append(int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
    print(f"megabytes after each 100 requests: {held}")
    assert held[4] - held[1] < 2
