"""What is measured: one function a section, each returning what goes into `bench.json`."""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench import peers
from iclgd_helpers import paths, pinned_downloads
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Layout, Query, TokenTree, TrainingSequence
from iclgd_helpers.engine import finetune, models, parts
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, Observation, observe
from iclgd_helpers.experiments import comparison, cost, experiment, inputs, parameters, records, runs, updates
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.paths import repository_root

LABELS = ("clearly a failure", "rather a failure", "rather a success", "clearly a success")  # three tokens each


@dataclass(frozen=True)
class Setting:
    """Sizes of everything; `quick()` is for tests of the bench itself and measures nothing of use."""

    model: str = "SmolLM2-135M-Instruct"
    task: str = "sst2"
    data_source: str | None = None  # the folder that is named, else the hub
    separator: str = "newline"  # as text, so that all peers can be given the same prompt
    n_demonstrations: int = 32
    queries: int = 200
    rounds: int = 3
    recomputed: int = 25  # queries a round that are recomputed the original's way; others in each round
    recompute_rounds: int = 4
    engine_queries: int = 400  # of the engine beside it: the prefix is paid once for all
    llama_queries: int = 100
    lm_eval_rounds: int = 1
    matrices: tuple[int, ...] = (1024, 2048, 4096)
    steps: int = 4
    memory: tuple[int, int] = (200, 800)
    record: int = 32
    growth_queries: tuple[int, ...] = (100, 800, 3200)
    growth_demonstrations: tuple[int, ...] = (4, 8, 16, 32, 64)
    growth_layers: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    growth_rows: int = 60  # queries behind the last two

    @classmethod
    def quick(cls) -> Setting:
        return cls(
            "tiny-llama", "snippets", "generated", "newline", 4, 12, 2, 3, 2, 8, 4, 1, (64, 128), 2, (8, 16), 8,
            (4, 8, 16), (1, 2, 4), (0.34, 1.0), 6,
        )  # fmt: skip

    def parameters(self, **changed: Any) -> parameters.ExperimentParameters:
        own = {name: getattr(self, name) for name in ("model", "task", "data_source", "separator", "n_demonstrations")}
        rest = {"preset": "quick", "max_examples": self.queries, "device": "cpu", "dtype": "float32"}
        return parameters.resolve(rest | own | changed)


class Bench:
    """The setting, what earlier sections found, and the one model in memory."""

    def __init__(self, setting: Setting, folder: Path, done: Mapping[str, Any]) -> None:
        self.setting, self.folder, self.done = setting, folder, done

    @cached_property
    def cell(self) -> Run:
        return runs.prepare(self.setting.parameters())

    @cached_property
    def shape(self) -> cost.Shape:
        return cost.Shape.of(self.cell.model.model.config)

    @property
    def peak(self) -> float:
        return self.done["scoring"]["peak_flops"]["float32"]

    @cached_property
    def in_context(self) -> Arm:
        return Arm(self.cell.layout.prefix(self.cell.demonstrations))

    @cached_property
    def ours(self) -> np.ndarray:
        """Label log-probabilities of the engine, `[query, class]`."""
        return score(self.cell.model, self.cell.queries, self.in_context)

    def some(self, n: int) -> list[Query]:
        """`n` queries; rows repeat when the task has fewer."""
        queries = self.cell.queries
        return [queries[i % len(queries)] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------- measuring
def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(rounds: int, **runs: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each of `runs`, one after the other, `rounds` times: what disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _round in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def score(model: LanguageModel, queries: Sequence[Query], arm: Arm, batch_tokens: int | None = None) -> np.ndarray:
    """The scoring loop, recording on: every observation is made; of it the log-probabilities are kept."""
    options = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    result = np.zeros((len(queries), len(queries[0].labels)))
    for indices, seen in observe(model, queries, {"arm": arm}, **options):
        result[indices] = seen["arm"].label_log_probabilities.double().cpu().numpy()
    return result


def useful(shape: cost.Shape, queries: Sequence[Query], prefix: int) -> float:
    """Operations of the scoring loop without padding: the prefix once, then every query."""
    work = cost.forward(shape, prefix)
    for query in queries:
        tokens, rows = len(query.tokens), len({place for places in query.tree.places for place in places})
        work += cost.forward(shape, tokens, prefix, rows) + cost.recording(shape, tokens, len(query.labels))
    return work.total


def product_rate(sizes: Sequence[int], dtype: torch.dtype) -> float:
    """Best FLOP/s of a square matrix product."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        a @ b
        best = max(best, max(2 * size**3 / timed(lambda a=a, b=b: a @ b) for _ in range(4)))
    return best


def differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two sets of label log-probabilities `[query, class]` lie apart, and how often they predict the same."""
    gap = np.abs(ours - theirs)
    return {
        "same_prediction": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "largest_log_probability_difference": float(gap.max()),
        "median_log_probability_difference": float(np.median(gap)),
    }


def child(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run `job` in a fresh process of this environment; its result, and the seconds of the whole process."""
    command = [sys.executable, "-m", "bench", "--child", json.dumps(job)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository_root())
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"child process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"whole_process_seconds": seconds}


def peak_memory() -> int:
    """Most memory that this process has held, bytes; not that of the process which started it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


# ------------------------------------------------------------------------------------------------------------ sections
def scoring(bench: Bench) -> dict[str, Any]:
    """The scoring loop beside the largest matrix products; float32 and bfloat16 in turn."""
    cell, setting = bench.cell, bench.setting
    half = models.load_model(setting.model, "bfloat16", "cpu")
    queries = cell.queries
    found: dict[str, np.ndarray] = {}
    rates = {"float32": 0.0, "bfloat16": 0.0}

    def run(name: str, model: LanguageModel) -> None:
        found[name] = score(model, queries, bench.in_context)

    for model in (cell.model, half):
        score(model, queries[:4], bench.in_context)
    seconds: dict[str, list[float]] = {name: [] for name in rates}
    for _round in range(setting.rounds):
        for name, model in (("float32", cell.model), ("bfloat16", half)):
            rates[name] = max(rates[name], product_rate(setting.matrices, getattr(torch, name)))
            seconds[name].append(timed(lambda name=name, model=model: run(name, model)))
    flops = useful(bench.shape, queries, len(bench.in_context.prefix))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "fraction_of_peak": flops / medians["float32"] / rates["float32"],
        "bfloat16_speedup": medians["float32"] / medians["bfloat16"],
        "bfloat16_agreement": differences(found["float32"], found["bfloat16"]),
        "bfloat16_fraction_of_peak": flops / medians["bfloat16"] / rates["bfloat16"],
        "peak_flops": rates,
        "useful_flops": flops,
        "seconds": seconds,
        "n_queries": len(queries),
        "prefix_tokens": len(bench.in_context.prefix),
        "query_tokens": sum(len(query.tokens) for query in queries),
    }


class _Stock:
    """The stock model with transformers' own attention; notes scores and attention outputs of one position."""

    NAME = "bench_recording"

    def __init__(self, model: LanguageModel) -> None:
        self.model = copy.deepcopy(model.model)
        self.read, self.scores, self.outputs = 0, [], []
        AttentionInterface.register(self.NAME, self._attention)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)  # without this there would be no causal mask
        self.model.set_attn_implementation(self.NAME)
        for attention in parts.find(self.model, model.name).attentions:
            attention.register_forward_hook(self._keep)

    def _attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        self.scores.append((keys @ query[0, :, self.read, :, None])[..., 0] * options["scaling"])
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: tuple) -> None:
        self.outputs.append(output[0][0, self.read])

    @torch.no_grad()
    def observe(self, prefix: Sequence[int], query: Query, rows: int = 0) -> tuple[Tensor, ...]:
        """One query as the original treats it: the whole prompt, the head at every position (`rows`=0) or the last."""
        start = len(prefix)
        self.read, self.scores, self.outputs = start + query.read, [], []
        tokens = torch.tensor([[*prefix, *query.tokens]])
        logits = self.model(tokens, use_cache=False, logits_to_keep=rows).logits[0]
        position = start + query.predict - tokens.shape[1]  # from the end
        log_probabilities = torch.log_softmax(logits[position].float(), -1)[[label[0] for label in query.labels]]
        scores = torch.stack(self.scores)[:, :, start:]  # [layer, head, token]
        return log_probabilities, torch.stack(self.outputs), scores

    @torch.no_grad()
    def label_log_probabilities(self, prefix: Sequence[int], query: Query) -> Tensor:
        """Of labels of several tokens, `[class]`: the whole prompt once for each, as the original's way would be."""
        prompt, found = [*prefix, *query.tokens[: query.predict + 1]], []
        for label in query.labels:
            self.read, self.scores, self.outputs = len(prompt) - 1, [], []
            logits = self.model(torch.tensor([[*prompt, *label]]), use_cache=False).logits[0, -len(label) - 1 : -1]
            log_probabilities = torch.log_softmax(logits.float(), -1)
            found.append(log_probabilities[torch.arange(len(label)), list(label)].sum())
        return torch.stack(found)


def recompute(bench: Bench) -> dict[str, Any]:
    """The original's way: every prompt from its first token, one at a time; and the engine on all queries."""
    cell, setting = bench.cell, bench.setting
    stock, prefix = _Stock(cell.model), bench.in_context.prefix
    order = sorted(range(len(cell.queries)), key=lambda i: len(cell.queries[i].tokens))
    chosen = order[:: max(1, len(order) // (setting.recomputed * setting.recompute_rounds))]
    rounds = [chosen[i :: setting.recompute_rounds][: setting.recomputed] for i in range(setting.recompute_rounds)]
    engine = {}
    for indices, seen in observe(cell.model, cell.queries, {"arm": bench.in_context}):
        engine |= {i: (seen["arm"], row) for row, i in enumerate(indices)}
    gaps, seconds, tokens = [], {"recomputed": [], "recomputed_needed_rows": [], "engine": []}, 0
    stock.observe(prefix, cell.queries[0])
    for indices in rounds:
        start, found = time.perf_counter(), {}
        for i in indices:
            found[i] = stock.observe(prefix, cell.queries[i])
        seconds["recomputed"].append((time.perf_counter() - start) / len(indices))
        few = indices[:: max(1, len(indices) // 5)]
        one = timed(lambda few=few: [stock.observe(prefix, cell.queries[i], rows=2) for i in few])
        seconds["recomputed_needed_rows"].append(one / len(few))
        whole = timed(lambda: score(cell.model, bench.some(setting.engine_queries), bench.in_context))
        seconds["engine"].append(whole / setting.engine_queries)
        for i, theirs in found.items():
            gaps.append(_gaps(*engine[i], theirs, len(cell.queries[i].tokens), cell.queries[i].read))
            tokens += len(prefix) + len(cell.queries[i].tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    largest = {name: max(gap[name] for gap in gaps) for name in gaps[0]}
    n = sum(map(len, rounds))
    return {
        "ratio_vs_recompute": medians["recomputed"] / medians["engine"],
        "ratio_with_needed_rows_only": medians["recomputed_needed_rows"] / medians["engine"],
        "largest_differences": largest,
        "same_numbers": max(largest.values()) < 1e-4,
        "seconds_a_query": seconds,
        "n_queries_recomputed": n,
        "n_queries_engine": setting.engine_queries,
        "mean_prompt_tokens": tokens / n,
        "counts": "the engine's time includes its prefix",
    }


def labels(bench: Bench) -> dict[str, Any]:
    """Four labels of three tokens: the original's way computes the prompt once for each, the engine once for all."""
    cell, setting = bench.cell, bench.setting
    task = replace(cell.layout.task, verbalizers=LABELS)
    layout = Layout.make(cell.layout.tokenizer, task, setting.separator)
    examples = inputs.task_data(cell.parameters).evaluation[: len(cell.queries)]
    queries = [layout.query(example, cell.parameters.token_read) for example in examples]
    arm = Arm(layout.prefix(cell.demonstrations))
    stock, ours = _Stock(cell.model), score(cell.model, queries, arm)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].tokens))
    chosen = order[:: max(1, len(order) // setting.recomputed)][: setting.recomputed]
    rounds = [chosen[i :: setting.recompute_rounds] for i in range(setting.recompute_rounds)]
    seconds: dict[str, list[float]] = {"recomputed": [], "engine": []}
    theirs: dict[int, np.ndarray] = {}
    stock.label_log_probabilities(arm.prefix, queries[0])
    many = [queries[i % len(queries)] for i in range(setting.engine_queries)]
    for indices in filter(None, rounds):
        start = time.perf_counter()
        theirs |= {i: stock.label_log_probabilities(arm.prefix, queries[i]).double().numpy() for i in indices}
        seconds["recomputed"].append((time.perf_counter() - start) / len(indices))
        seconds["engine"].append(timed(lambda: score(cell.model, many, arm)) / len(many))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    apart = differences(ours[list(theirs)], np.stack(list(theirs.values())))
    return {
        "ratio_vs_recompute": medians["recomputed"] / medians["engine"],
        "same_numbers": apart["largest_log_probability_difference"] < 1e-3,
        "differences": apart,
        "seconds_a_query": seconds,
        "label_tokens": [len(label) for label in layout.labels],
        "n_queries_recomputed": len(theirs),
        "n_queries_engine": len(many),
        "counts": "the engine's time includes its prefix",
    }


def _gaps(ours: Observation, row: int, theirs: tuple[Tensor, ...], tokens: int, read: int) -> dict[str, float]:
    """Largest differences of what was recorded, relative to the largest entry where that is above 1."""
    scores = ours.attention_scores[row][..., : read + 1]
    pairs = {
        "label_log_probability": (ours.label_log_probabilities[row], theirs[0]),
        "attention_output": (ours.attention_output[row], theirs[1]),
        "attention_score": (scores, theirs[2][..., : read + 1]),
    }
    return {k: float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for k, (a, b) in pairs.items()}


def llama_cpp(bench: Bench) -> dict[str, Any]:
    """
    llama.cpp's marginal time a query against the engine's; both exclude model and prefix.

    llama.cpp holds 4-bit weights and multiplies in 8 bits. So the ratio is taken with the engine in bfloat16, where
    both use the processor's units for low precision; the one in float32, and its bound at the full rate of float32
    products, stand beside it.
    """
    peers.make_environment()
    cell, n = bench.cell, bench.setting.llama_queries
    gguf = peers.gguf_file(bench.setting.model, bench.folder)
    queries = cell.queries[:n]
    engines = {"engine": cell.model, "engine_bfloat16": models.load_model(bench.setting.model, "bfloat16", "cpu")}
    seconds: dict[str, list[float]] = {"llama_cpp": [], **{name: [] for name in engines}}
    for _round in range(bench.setting.rounds):
        theirs = peers.llama_cpp(cell, gguf, n, bench.folder)
        seconds["llama_cpp"].append(statistics.fmean(theirs["queries"]))
        for name, model in engines.items():
            prefix = timed(lambda model=model: model.prefix(bench.in_context.prefix))
            whole = timed(lambda model=model: score(model, queries, bench.in_context))
            seconds[name].append((whole - prefix) / n)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    prefix = len(bench.in_context.prefix)
    work = useful(bench.shape, queries, prefix) - cost.forward(bench.shape, prefix).total
    return {
        "ratio_vs_llama_cpp": medians["llama_cpp"] / medians["engine_bfloat16"],
        "ratio_vs_llama_cpp_float32": medians["llama_cpp"] / medians["engine"],
        "float32_bound": medians["llama_cpp"] / (work / bench.peak / n),
        "seconds_a_query": seconds,
        "n_queries": n,
        "agreement": differences(bench.ours[:n], np.array(theirs["log_probabilities"])),
        "weights": "llama.cpp: Q4_1 as stored; engine: the same weights de-quantised, recording on",
        "compiled": peers.compiler_options(),
    }


def lm_eval(bench: Bench) -> dict[str, Any]:
    """lm-evaluation-harness: whole processes, model load included, predictions only."""
    peers.make_environment()
    cell, n = bench.cell, len(bench.cell.queries)
    model = pinned_downloads.model_folder(bench.setting.model)
    seconds: dict[str, list[float]] = {"lm_eval": [], "engine": []}
    for _round in range(bench.setting.lm_eval_rounds):
        theirs = peers.lm_eval(cell, model, n, bench.folder / "lm_eval")
        seconds["lm_eval"].append(theirs["seconds"])
        for _ in range(2):
            job = {"what": "predict", "setting": asdict(bench.setting)}
            seconds["engine"].append(child(job)["whole_process_seconds"])
    return {
        "ratio_vs_lm_eval": statistics.median(seconds["lm_eval"]) / statistics.median(seconds["engine"]),
        "seconds": seconds,
        "rounds": bench.setting.lm_eval_rounds,
        "n_queries": n,
        "agreement": differences(bench.ours, np.array(theirs["log_probabilities"])),
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of fresh processes that observe and compare three arms on few and on many queries."""
    few, many = bench.setting.memory

    def run(n: int, keep: bool) -> dict[str, Any]:
        return child({"what": "memory", "setting": asdict(bench.setting), "n": n, "keep": keep})

    found = {"few": run(few, False), "many": run(many, False), "few_kept": run(few, True)}
    kept = found["few_kept"]["kept_bytes"] / few
    return {
        "memory_growth": found["many"]["peak_bytes"] / found["few"]["peak_bytes"],
        "n_queries": [few, many],
        "processes": found,
        "observed_bytes_per_query": kept,
        "growth_if_kept": (found["few_kept"]["peak_bytes"] + kept * (many - few)) / found["few_kept"]["peak_bytes"],
        "counts": "peak resident memory of the whole process, interpreter and model load included; growth_if_kept adds "
        "what was observed of the further queries to the peak measured with everything kept",
    }


def record(bench: Bench) -> dict[str, Any]:
    """Stored bytes that one more query costs when every arm sees it: two sizes of one record, compared."""
    n = bench.setting.record
    cell = replace(bench.cell, queries=bench.cell.queries[:n], training=bench.cell.training[:2])
    cell = replace(cell, demonstrations=bench.cell.demonstrations[:2])
    whole = experiment.compute(cell, progress=False)
    sizes = {}
    for rows in (n // 2, n):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            path = records.save(records.Record(whole.json, whole.examples.iloc[:rows]), Path(folder))
            sizes[rows] = (path / records.PARQUET).stat().st_size
    marginal = (sizes[n] - sizes[n // 2]) / (n - n // 2)
    stored = [r for r in records.load_all("results/records") if r.json["parameters"]["model"] == bench.setting.model]
    return {
        "bytes_per_query": marginal,
        "parquet_bytes_of_no_query": sizes[n] - n * marginal,
        "json_bytes": len(json.dumps(whole.json, indent=1)),
        "n_arms": len(whole.json["arms"]),
        "stored_records": {r.json["id"]: _whole_size(r) for r in stored},
    }


def _whole_size(stored: records.Record) -> dict[str, Any]:
    folder = paths.resolve_path("results/records") / stored.json["id"]
    whole = sum(path.stat().st_size for path in folder.iterdir())
    return {"bytes": whole, "n_queries": stored.json["n_examples"], "n_compared": stored.json["n_compared"]}


def finetune_step(bench: Bench) -> dict[str, Any]:
    """One step of each method: seconds, counted operations, share of the peak."""
    cell = bench.cell
    sequences = [cell.layout.training_sequence(example) for example in cell.training[: bench.setting.steps]]
    seconds: dict[str, list[list[float]]] = {method: [] for method in finetune.METHODS}
    for _round in range(bench.setting.rounds):
        for method in finetune.METHODS:
            seconds[method].append(_steps(cell, sequences, method))
    result = {}
    for method, rounds in seconds.items():
        lengths = [len(sequence.tokens) for sequence in sequences]
        flops = [cost.STEPS[method](bench.shape, n, n - 1).total for n in lengths]
        typical = [statistics.median(values) for values in zip(*rounds, strict=True)]  # of each sequence
        result[method] = {
            "seconds": statistics.fmean(typical),
            "flops": statistics.fmean(flops),
            "share_of_peak": sum(flops) / sum(typical) / bench.peak,
            "mean_tokens": statistics.fmean(lengths),
        }
    return {"finetune_step": result, "rounds": bench.setting.rounds}


def _steps(cell: Run, sequences: Sequence[TrainingSequence], method: str) -> list[float]:
    """Seconds of the step on each of `sequences`; a first one, on the last of them, is not counted."""
    times = [time.perf_counter()]
    learner = finetune.Learner([sequences[-1], *sequences], updates.settings(cell.parameters, method))
    finetune.finetune_together(cell.model, [learner], method, lambda: times.append(time.perf_counter()))
    return np.diff(times)[1:].tolist()


def growth(bench: Bench) -> dict[str, Any]:
    """Time against number of queries, demonstrations and layers, beside the counted operations."""
    cell, setting = bench.cell, bench.setting
    few = bench.some(setting.growth_rows)

    def point(x: int, model: LanguageModel, shape: cost.Shape, queries: Sequence[Query], arm: Arm) -> dict[str, Any]:
        rounds = 1 if len(queries) > setting.queries else 2
        seconds = min(timed(lambda: score(model, queries, arm)) for _ in range(rounds))
        flops = useful(shape, queries, len(arm.prefix))
        return {"x": x, "seconds": seconds, "flops": flops, "n_queries": len(queries), "prefix": len(arm.prefix)}

    model, shape, arm = cell.model, bench.shape, bench.in_context
    train, most = peers.task_data(cell).train, max(setting.growth_demonstrations)
    data = select_demonstrations(train, most, cell.parameters.seed, cell.parameters.balanced)
    arms = {k: Arm(cell.layout.prefix(data[:k])) for k in setting.growth_demonstrations}
    layers = sorted({max(1, round(share * shape.n_layers)) for share in setting.growth_layers})
    result = {
        "queries": [point(n, model, shape, bench.some(n), arm) for n in setting.growth_queries],
        "demonstrations": [point(k, model, shape, few, arm) for k, arm in arms.items()],
        "layers": [],
    }
    for n in layers:
        with truncated(model, n) as shorter:
            result["layers"].append(point(n, shorter, shape.truncated(n), few, arm))
    return {"growth": result, "rows_of_the_task": len(cell.queries)}


@contextmanager
def truncated(model: LanguageModel, n_layers: int) -> Iterator[LanguageModel]:
    """The model with its first layers only."""
    owner, config = parts.find(model.model, model.name).owner, model.model.config
    (name,) = (name for name, child in owner.named_children() if child is model.layers)
    layers, before = model.layers, config.num_hidden_layers
    try:
        setattr(owner, name, nn.ModuleList(layers[:n_layers]))
        config.num_hidden_layers = n_layers
        yield LanguageModel(model.model, model.tokenizer, model.name)
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = before


def ablations(bench: Bench) -> dict[str, Any]:
    """Each factor switched off in turn; seconds a query (or a step), beside everything on."""
    cell, setting = bench.cell, bench.setting
    queries, model, arm = bench.some(setting.growth_rows), bench.cell.model, bench.in_context
    whole = [prompt_and_query(arm.prefix, query) for query in queries[:: max(1, len(queries) // setting.recomputed)]]
    bare = Arm(cell.layout.prefix())

    def every_position() -> None:
        with head_everywhere(model):
            score(model, queries, arm)

    seconds = in_turn(
        2,
        all_on=lambda: score(model, queries, arm),
        shared_prefix=lambda: score(model, whole, bare),
        batching=lambda: score(model, queries, arm, batch_tokens=1),
        needed_rows=every_position,
    )
    sizes = {"shared_prefix": len(whole)}
    scoring_loop = {name: min(values) / sizes.get(name, len(queries)) for name, values in seconds.items()}
    sequence = cell.layout.training_sequence(cell.training[0])
    steps = in_turn(
        max(3, setting.rounds),
        kv_only=lambda: gradient(model, sequence, False),
        all_parameters=lambda: gradient(model, sequence, True),
    )
    return {
        "ablations": {
            "seconds_a_query": scoring_loop,
            "seconds_a_gradient": {name: statistics.median(values) for name, values in steps.items()},
            "gradient_bytes": {"kv_only": 4 * bench.shape.n_stored, "all_parameters": 4 * bench.shape.n_parameters},
        },
        "n_queries": {name: sizes.get(name, len(queries)) for name in seconds},
        "rounds": 2,
    }


def prompt_and_query(prefix: Sequence[int], query: Query) -> Query:
    """The query with all of the prefix but BOS as its own tokens."""
    more = tuple(prefix[1:])
    trunk = more + query.tokens[: query.predict + 1]
    tree = TokenTree.of(trunk, query.labels, query.tokens[query.predict + 1 :][: len(query.labels[0])])
    return replace(query, tree=tree, predict=query.predict + len(more), read=query.read + len(more))


@contextmanager
def head_everywhere(model: LanguageModel) -> Iterator[None]:
    """The vocabulary projection at every position, as a stock forward pass makes it."""
    plain = model.hidden

    def hidden(*arguments: Any, **options: Any) -> Tensor:
        states = plain(*arguments, **options)
        model.head(states)
        return states

    model.hidden = hidden
    try:
        yield
    finally:
        del model.hidden


def gradient(model: LanguageModel, sequence: TrainingSequence, everything: bool) -> None:
    """Loss and gradients of one training sequence: of the K/V projections, or of every parameter."""
    chosen = list(model.model.parameters()) if everything else [t.parameter for t in model.trainables]
    targets = finetune.Targets.of([sequence], "all", model.device)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        states = model.hidden(targets.tokens)
        if everything:  # as the original code does: the head's gradient, too
            loss = nn.functional.cross_entropy(model.head(states[0, :-1]), targets.words[0])
        else:
            loss = finetune.sequence_loss(model, states, targets)
        torch.autograd.grad(loss, chosen)
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ children
def run_child(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process does: `predict`, or `memory`."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in job["setting"].items()}
    bench = Bench(Setting(**values), Path(), {})
    if job["what"] == "predict":
        return {"accuracy": float((bench.ours.argmax(-1) == [q.label for q in bench.cell.queries]).mean())}
    cell, n = bench.cell, job["n"]
    bare = Arm(cell.layout.prefix())
    moved = Arm(bare.prefix, finetune.random_update(cell.model, 0, 1.0))
    loaded, kept, table = peak_memory(), [], []
    arms = {"zero_shot": bare, "in_context": bench.in_context, "standard": moved}
    queries = bench.some(n)
    for indices, seen in observe(cell.model, queries, arms):
        rows = [queries[i].row for i in indices]
        compared = comparison.similarities(*seen.values(), cell, rows)
        table.append([value.half() for value in compared.values()])
        if job["keep"]:
            kept.append(seen)
    parts = (part for batch in kept for observation in batch.values() for part in vars(observation).values())
    return {"peak_bytes": peak_memory(), "loaded_bytes": loaded, "kept_bytes": sum(part.nbytes for part in parts)}
