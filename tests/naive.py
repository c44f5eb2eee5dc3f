"""
A second, naive implementation of everything that the helpers compute with a language model.

It shares no code with them: transformers' own model classes with eager attention, one query at a time, the
whole prompt computed anew for each, plain autograd over the whole model, explicit loops.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

# Where each family keeps its blocks, the matrix after attention, the last norm, and keys and values; most are as Llama.
BLOCKS = dict.fromkeys("gpt2 gptj gpt_neo falcon bloom".split(), "transformer.h") | {
    "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "mpt": "transformer.blocks",
}  # fmt: skip
AFTER_ATTENTION = {
    "xglm": "self_attn.out_proj", "opt": "self_attn.out_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense",
    "phi": "self_attn.dense", "falcon": "self_attention.dense", "bloom": "self_attention.dense",
    "gptj": "attn.out_proj", "gpt_neo": "attn.attention.out_proj", "mpt": "attn.out_proj",
}  # fmt: skip
LAST_NORM = dict.fromkeys("gpt2 gptj gpt_neo falcon bloom".split(), "transformer.ln_f") | {
    "xglm": "model.layer_norm", "opt": "model.decoder.final_layer_norm", "phi": "model.final_layernorm",
    "gpt_neox": "gpt_neox.final_layer_norm", "mpt": "transformer.norm_f",
}  # fmt: skip
FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "mpt": "Wqkv"}
FUSED |= dict.fromkeys("gpt_neox falcon bloom".split(), "query_key_value")  # all others: k_proj and v_proj


def stock(language_model):
    """transformers' own model with a copy of the present weights of `language_model`."""
    source = language_model.model
    config = copy.deepcopy(source.config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        model = type(source)._from_config(config, attn_implementation="eager", dtype=source.dtype)
    model.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    for (name, new), old in zip(model.named_buffers(), source.buffers(), strict=True):
        assert torch.equal(new, old), name
    return model.eval().requires_grad_(False)


def blocks(model):
    return model.get_submodule(BLOCKS.get(model.config.model_type, "model.layers"))


def key_values(model, layer):
    """Names and parameters of the key and value projections of one layer."""
    kind = model.config.model_type
    wanted = (FUSED[kind],) if kind in FUSED else ("k_proj", "v_proj")
    named = blocks(model)[layer].named_parameters()
    return [(name, parameter) for name, parameter in named if name.split(".")[-2] in wanted]


def without_query(model, tensor):
    """A copy of a fused projection's weight, bias or gradient with 0 in the part that makes queries."""
    kind, config, tensor = model.config.model_type, model.config, tensor.clone()
    if kind == "gpt2":  # [..., (query, key, value) of all heads]
        tensor[..., : config.n_embd] = 0
    if kind in ("phi3", "mpt"):  # rows: queries of all heads, then keys, then values
        tensor[: config.hidden_size] = 0
    if kind in ("gpt_neox", "bloom", "falcon"):  # rows: for each group of heads, its queries, its key and its value
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        groups = heads
        if kind == "falcon":
            groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        by_group = tensor.view(groups, heads // groups + 2, size, *tensor.shape[1:])
        by_group[:, :-2] = 0
    return tensor


# ------------------------------------------------------------------------------------------------------- text
def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def context(tokenizer, task, demonstrations, separator):
    """BOS, then prompt, label and separator of each demonstration."""
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = [bos]
    for example in demonstrations:
        tokens += encode(tokenizer, example.prompt)
        tokens += encode(tokenizer, " " + task.verbalizers[example.label])
        tokens += [tokenizer.eos_token_id] if separator == "eos" else encode(tokenizer, "\n")
    return tokens


def label_tokens(tokenizer, task):
    """The tokens of each class's label."""
    return [encode(tokenizer, " " + word) for word in task.verbalizers]


def asked(tokenizer, task, demonstrations, prompt, separator="eos", label_prefix=" ", instruction=None):
    """Tokens before a question, tokens of it, and tokens of each label behind it: whole texts, read anew."""
    between = {"eos": [tokenizer.eos_token_id], "newline": encode(tokenizer, "\n")}.get(separator)
    between = encode(tokenizer, separator) if between is None else between
    before = context(tokenizer, task, [], separator)
    if instruction is not None:
        before += encode(tokenizer, instruction) + between
    for example in demonstrations:
        before += encode(tokenizer, example.prompt + label_prefix + task.verbalizers[example.label]) + between
    kept = label_prefix[:-1] if label_prefix.endswith(" ") else label_prefix  # the last blank is the label's
    question = encode(tokenizer, prompt + kept)
    wholes = [encode(tokenizer, prompt + label_prefix + word) for word in task.verbalizers]
    assert all(whole[: len(question)] == question for whole in wholes)
    return before, question, [whole[len(question) :] for whole in wholes]


def conversed(tokenizer, task, demonstrations, prompt, instruction=None, has_system=True):
    """All tokens up to the answer of a question, by the tokenizer's own chat template, and those of each label."""
    turns = []
    for example in demonstrations:
        turns.append({"role": "user", "content": example.prompt})
        turns.append({"role": "assistant", "content": task.verbalizers[example.label]})
    turns.append({"role": "user", "content": prompt})
    if instruction is not None and has_system:
        turns = [{"role": "system", "content": instruction}, *turns]
    elif instruction is not None:
        turns[0]["content"] = instruction + "\n\n" + turns[0]["content"]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = encode(tokenizer, text)
    wholes = [encode(tokenizer, text + word) for word in task.verbalizers]
    assert all(one[: len(whole)] == whole for one in wholes)
    return whole, [one[len(whole) :] for one in wholes]


@dataclass
class Sequence:
    """What one finetuning step sees: the tokens of the prompt, then the example's own label."""

    trunk: list
    answer: list
    labels: list  # of every class
    label: int
    label_score: str = "sum"


def sequence(tokenizer, task, example, before):
    """One demonstration to be trained on, behind the tokens `before`."""
    labels = label_tokens(tokenizer, task)
    return Sequence([*before, *encode(tokenizer, example.prompt)], labels[example.label], labels, example.label)


# ---------------------------------------------------------------------------------------------------- forward
class _Scores(TorchFunctionMode):
    """What goes into and comes out of the softmax of each attention layer, from the bottom to the top."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.softmax and args[0].ndim > 2:  # a router's has two axes
            self.inputs.append(args[0])
            self.outputs.append(result)
        return result


@dataclass
class Seen:
    logits: torch.Tensor  # [token, vocabulary]
    block_outputs: list  # a layer: [token, d_model]
    attention_outputs: list  # a layer: [token, d_model]
    scores: list  # a layer: [head, token, token], 0 where the model's own mask hides a token
    weights: list  # a layer: [head, token, token]


def forward(model, tokens):
    """One sequence through the stock model: nothing is passed but the tokens."""
    kind, after_block, after_attention, handles = model.config.model_type, [], [], []
    where = AFTER_ATTENTION.get(kind, "self_attn.o_proj")
    for block in blocks(model):
        handles.append(block.register_forward_hook(
            lambda m, i, o: after_block.append(o[0][0] if isinstance(o, tuple) else o[0])
        ))  # fmt: skip
        projection = block.get_submodule(where)
        if kind == "falcon" and model.config.alibi:  # its eager code adds ALiBi twice, its default code once
            handles.append(block.self_attention.register_forward_pre_hook(without_second_alibi, with_kwargs=True))
        handles.append(projection.register_forward_hook(lambda m, i, o: after_attention.append(o[0])))
    try:
        with _Scores() as seen:
            output = model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    n, rows, weights = len(tokens), [], []
    lowest = torch.finfo(output.logits.dtype).min / 2
    for into, out in zip(seen.inputs, seen.outputs, strict=True):
        width = n + (kind == "gpt_oss")  # the sink stands behind the keys
        into, out = (x.view(-1, n, width) for x in (into, out))
        shift = own_score(model, n)
        if kind == "gpt_oss":  # the largest score was subtracted from all
            shift = blocks(model)[len(rows)].self_attn.sinks[:, None, None] - into[..., n:]
        rows.append((into[..., :n] + shift).masked_fill(into[..., :n] < lowest, 0.0))
        weights.append(out[..., :n])
    assert len(rows) == len(after_block) == len(after_attention)
    return Seen(output.logits[0], after_block, after_attention, rows, weights)


def without_second_alibi(_module, inputs, keywords):
    """Keywords of Falcon's attention in which ALiBi is part of the mask only."""
    return inputs, keywords | {"alibi": torch.zeros_like(keywords["alibi"])}


def own_score(model, n_tokens):
    """What ALiBi adds to a token's score of its own key, with a minus: softmax does not see it; `[head, token, 1]`."""
    config, every = model.config, torch.ones(1, n_tokens, dtype=torch.long)
    if config.model_type == "bloom":
        alibi = modeling_bloom.build_alibi_tensor(every, config.n_head, model.dtype)
        return -alibi.view(config.n_head, n_tokens, 1)
    if config.model_type == "mpt":
        return -model.base_model.build_mpt_alibi_tensor(config.n_heads, config.max_seq_len)[:, :, -n_tokens:].mT
    if config.model_type == "falcon" and config.alibi:
        heads = config.num_attention_heads
        alibi = modeling_falcon.build_alibi_tensor(every, heads, model.dtype)
        return -alibi.view(heads, n_tokens, 1) / math.sqrt(config.hidden_size // heads)
    return 0.0


def lens_logits(model, states):
    """Logits of a layer's output as if it were the last layer's, by the model's own code behind its layers."""
    norm = LAST_NORM.get(model.config.model_type, "model.norm")
    owner, _, name = norm.rpartition(".")
    norm = getattr(model.get_submodule(owner), name)  # an old OPT has none
    states = states if norm is None else norm(states)
    project_out = getattr(model.get_submodule(owner), "project_out", None)
    states = states if project_out is None else project_out(states)
    base = model.get_submodule(owner)
    base.forward = lambda *_given, **_named: OnlyStates(states[None])
    try:
        return model(input_ids=torch.zeros(1, len(states), dtype=torch.long), use_cache=False).logits[0]
    finally:
        del base.forward


class OnlyStates:
    """An output of a model without its head that holds the last states and nothing else."""

    def __init__(self, states):
        self.last_hidden_state = states

    def __getitem__(self, _index):
        return self.last_hidden_state

    def __getattr__(self, _name):
        return None


def label_score(logits, tokens, n_label, score):
    """Score of a label from the logits `[token, vocabulary]` of a sequence that ends in its `n_label` tokens."""
    terms = []
    for place in range(len(tokens) - n_label, len(tokens)):
        terms.append(logits[place - 1][tokens[place]] - logits[place - 1].logsumexp(-1))
    return {"sum": sum(terms), "mean": sum(terms) / len(terms), "first": terms[0]}[score]


@torch.no_grad()
def observe(model, before, prompt, labels, token_read="label", score="sum"):
    """Label log-probabilities, lens logits, attention output and scores of one query behind `before`."""
    context = [*before, *prompt]
    passes = [forward(model, [*context, *labels[0]])]  # where a class's only token is predicted, too
    passes += [forward(model, [*context, *label]) if len(label) > 1 else passes[0] for label in labels[1:]]
    scores = [
        label_score(seen.logits, [*context, *label], len(label), score)
        for seen, label in zip(passes, labels, strict=True)
    ]
    seen, predict = passes[0], len(context) - 1
    read = predict + len(labels[0]) if token_read == "label" else predict
    firsts = [label[0] for label in labels]
    return {
        "label_log_probabilities": torch.stack(scores),
        "lens": torch.stack([lens_logits(model, out[predict : predict + 1])[0, firsts] for out in seen.block_outputs]),
        "attention_output": torch.stack([out[read] for out in seen.attention_outputs]),
        "attention_scores": torch.stack([s[:, read, len(before) : read + 1] for s in seen.scores]),
        "attention_weights": torch.stack([w[:, read, : read + 1] for w in seen.weights]),
    }


# ------------------------------------------------------------------------------------------------- finetuning
def loss_passes(sequence, loss):
    """The sequences whose logits a loss reads: the example with its own label, or with each class's."""
    labels = sequence.labels if loss == "label_space" else [sequence.answer]
    return [([*sequence.trunk, *label], len(label)) for label in labels]


def loss_of(logits, passes, sequence, loss):
    """Loss of a training sequence from the logits of each of its passes."""
    (tokens, n_label), score = passes[0], sequence.label_score
    if loss == "all":
        terms = [logits[0][i - 1].logsumexp(0) - logits[0][i - 1][tokens[i]] for i in range(1, len(tokens))]
        return sum(terms) / len(terms)
    if loss == "label":
        return -label_score(logits[0], tokens, n_label, score)
    scores = [label_score(one, tokens, n, score) for one, (tokens, n) in zip(logits, passes, strict=True)]
    return torch.stack(scores).logsumexp(0) - scores[sequence.label]


def finetune(model, sequences, method, rate, loss="all", clip="none", clip_value=None):
    """Train the key and value projections of `model` itself; losses and gradient norms, a list a step."""
    n_layers = len(blocks(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [[p for _name, p in key_values(model, layer)] for layer in range(n_layers)]
    for parameters in trained:
        for parameter in parameters:
            parameter.requires_grad_(True)
    optimizers = [torch.optim.SGD(parameters, lr=rate) for parameters in trained]
    losses, norms = [], []
    for sequence in sequences:
        passes = loss_passes(sequence, loss)
        step_losses, step_norms = [], [0.0] * n_layers
        rounds = {"standard": [range(n_layers)], "joint": [range(n_layers)],
                  "sequential": [[layer] for layer in range(n_layers)]}[method]  # fmt: skip
        for layers in rounds:  # every round is forward passes with the present weights
            seen = [forward(model, tokens) for tokens, _n_label in passes]
            if method == "standard":
                value = loss_of([one.logits for one in seen], passes, sequence, loss)
                flat = [p for parameters in trained for p in parameters]
                for parameter, gradient in zip(flat, torch.autograd.grad(value, flat), strict=True):
                    parameter.grad = without_query(model, gradient)
                step_losses.append(value.detach().item())
            else:  # a layer's weights reach that layer's lens through the layer only: no detaching needed
                for layer in layers:
                    logits = [lens_logits(model, one.block_outputs[layer]) for one in seen]
                    value = loss_of(logits, passes, sequence, loss)
                    gradients = torch.autograd.grad(value, trained[layer], retain_graph=True)
                    for parameter, gradient in zip(trained[layer], gradients, strict=True):
                        parameter.grad = without_query(model, gradient)
                    step_losses.append(value.detach().item())
            for layer in layers:
                step_norms[layer] = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained[layer]))
            total = math.sqrt(sum(step_norms[layer] ** 2 for layer in layers))
            for layer in layers:
                for parameter in trained[layer]:
                    if clip == "elementwise":
                        parameter.grad = parameter.grad.clip(min=-clip_value, max=clip_value)
                    elif clip != "none":
                        norm = total if clip == "global" else step_norms[layer]
                        if norm > clip_value:
                            parameter.grad *= clip_value / norm
                optimizers[layer].step()
        losses.append(step_losses)
        norms.append(step_norms)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return losses, norms


def drift(before, after):
    """Relative change of each layer's key and value projections."""
    result = []
    for layer in range(len(blocks(before))):
        change = size = 0.0
        pairs = zip(key_values(before, layer), key_values(after, layer), strict=True)
        for (_name, old), (_same, new) in pairs:
            old, new = without_query(before, old).double(), without_query(before, new).double()
            change += (new - old).square().sum().item()
            size += old.square().sum().item()
        result.append(math.sqrt(change) / math.sqrt(size))
    return result


# ---------------------------------------------------------------------------------------------------- metrics
def numbers(vector):
    return vector.tolist() if isinstance(vector, torch.Tensor) else list(vector)


def cosine(a, b):
    a, b = numbers(a), numbers(b)
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else math.nan


def unit(vector):
    vector = numbers(vector)
    size = math.sqrt(sum(x * x for x in vector))
    return [x / size for x in vector]


def minus(a, b):
    return [x - y for x, y in zip(numbers(a), numbers(b), strict=True)]


def sim_aou(zero_shot, in_context, finetuned):
    """Of one layer's attention outputs of one example."""
    h0, h1, h2 = unit(zero_shot), unit(in_context), unit(finetuned)
    return cosine(minus(h1, h0), minus(h2, h0))


def sim_aou_raw(zero_shot, in_context, finetuned):
    return cosine(minus(in_context, zero_shot), minus(finetuned, zero_shot))


def sim_aou_null(zero_shot, in_context, finetuned):
    return 0.5 * math.sqrt((1 - cosine(in_context, zero_shot)) * (1 - cosine(finetuned, zero_shot)))


def mean(values):
    """Of the values that are numbers; NaN without any."""
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def sim_am(in_context, other):
    """Of one layer's scores `[head, token]` of one example."""
    return mean([cosine(a, b) for a, b in zip(in_context, other, strict=True)])


def sim_am_delta(zero_shot, in_context, finetuned):
    changes = ((minus(c, z), minus(f, z)) for z, c, f in zip(zero_shot, in_context, finetuned, strict=True))
    return mean([cosine(a, b) for a, b in changes])


def fixed(zero_shot, other, labels):
    return {i for i, label in enumerate(labels) if zero_shot[i] != label and other[i] == label}


def rec2ftp(zero_shot, in_context, finetuned, labels):
    both = fixed(zero_shot, finetuned, labels) & fixed(zero_shot, in_context, labels)
    n = len(fixed(zero_shot, finetuned, labels))
    return len(both) / n if n else math.nan


def jaccard(zero_shot, in_context, finetuned, labels, which="all", rule="code"):
    def changed(other):
        chosen = {i for i in range(len(labels)) if other[i] != zero_shot[i]}
        if which == "correct":
            chosen = {i for i in chosen if other[i] == labels[i]}
        if which == "incorrect":
            chosen = {i for i in chosen if other[i] != labels[i]}
        return chosen

    by_context, by_finetuning = changed(in_context), changed(finetuned)
    if rule == "set":
        union = by_context | by_finetuning
        return len(by_context & by_finetuning) / len(union) if union else math.nan
    numerator = len([i for i in by_finetuning if i in by_context and finetuned[i] == in_context[i]])
    denominator = len(by_context) + len(by_finetuning) - numerator
    return numerator / denominator if denominator else math.nan


def partition(zero_shot, in_context, finetuned, labels):
    parts = dict.fromkeys(
        "unchanged both_different both_correct both_incorrect in_context_correct in_context_incorrect "
        "finetuned_correct finetuned_incorrect".split(), 0
    )  # fmt: skip
    for z, c, f, y in zip(zero_shot, in_context, finetuned, labels, strict=True):
        if c == z and f == z:
            parts["unchanged"] += 1
        elif c != z and f != z and c != f:
            parts["both_different"] += 1
        elif c != z and f != z:
            parts["both_correct" if c == y else "both_incorrect"] += 1
        elif c != z:
            parts["in_context_correct" if c == y else "in_context_incorrect"] += 1
        else:
            parts["finetuned_correct" if f == y else "finetuned_incorrect"] += 1
    return parts
