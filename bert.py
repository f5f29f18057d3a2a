"""BERT: a bidirectional encoder, pre-trained by filling gaps, then fine-tuned.   Devlin et al. 2019 (1810.04805)

Idea      A model that reads in both directions cannot be trained to predict the next token: it sees it. So hide 15%
          of the tokens and let it guess them from both sides; and let it tell whether one text follows another.
          What it learns from text without labels is then fine-tuned, with one new layer, on a task with few.
Formula   x   = LayerNorm(E_token + E_position + E_segment)
          x   = LayerNorm(x + Attention(x));   x = LayerNorm(x + W_2 gelu(W_1 x + b_1) + b_2)   L times (post-norm)
          Attention(Q, K, V) = softmax(Q K^T / sqrt(Dh)) V            over all that is not padding, both directions
          masked    logits = LayerNorm(gelu(W x + b)) E_token^T + c   at the hidden positions;  loss = mean NLL of both
          next      logits = W tanh(W_p x_[CLS] + b_p) + b            does B follow A?
          span      best of S x_i + E x_j, i <= j, against no answer S x_[CLS] + E x_[CLS]
Shapes    tokens, segments, real (B, T) -> x (B, T, D) -> masked (B, T, V) or (N, V), next (B, 2), labels (B, n_labels),
          spans (B, T, 2), tags (B, T, n_labels).  A row is [CLS] A [SEP] or [CLS] A [SEP] B [SEP], padding behind.
Omits     multiple choice; decoders made of BERT; models without next-sentence head. Text becomes ids in wordpiece.py,
          ids become gaps and pairs in masked_lm.py, rows of the four tasks in finetune.py.
Run       python bert.py   pre-trains on Python's documentation, fine-tunes four heads: 2 to 5 minutes on two cores;
          Ends with "transfer: ..."
Test      pytest tests/test_bert.py
"""

import argparse
import json
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12


# --- 1. config ------------------------------------------------------------------------------

@dataclass
class BERTConfig:
    """The sizes of a BERT; the defaults are BERT-base's. A size that cannot be raises ValueError."""
    vocab_size: int = 30522
    context: int = 512
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None  # None: 4 * d_model
    n_segments: int = 2
    n_labels: int = 2  # of a classifier or tagger
    dropout: float = 0.1  # on the embeddings, both residual branches and what a classifier or tagger reads
    attention_dropout: float = 0.1
    initializer_range: float = 0.02  # standard deviation of new weights; narrow models learn sooner with more

    def __post_init__(self):
        self.d_ff = 4 * self.d_model if self.d_ff is None else self.d_ff
        for name in ("vocab_size", "context", "n_layers", "n_heads", "d_model", "d_ff", "n_segments", "n_labels"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} heads and width {self.d_model}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range must be above 0, got {self.initializer_range}")


PRESETS = {  # section 3; "110M" and "340M" parameters
    "bert-base": BERTConfig(),
    "bert-large": BERTConfig(n_layers=24, n_heads=16, d_model=1024),
}


# --- 2. the encoder -------------------------------------------------------------------------

def naive_bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None,
                                  dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(Dh)) V over the real keys.   Vaswani et al. 2017, eq. 1

    q, k, v (B, H, T, Dh), real (B, T) bool, at least one True a row; None: all -> (B, H, T, Dh). ``dropout``: the
    share of weights set to 0.
    """
    scores = (q / math.sqrt(q.size(-1))) @ k.mT  # (B, H, T, T)
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None], float("-inf"))
    return F.dropout(torch.softmax(scores, -1), dropout) @ v


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None,
                            dropout: float = 0.0) -> Tensor:
    """``naive_bidirectional_attention`` by torch's fused kernels."""
    mask = None if real is None else real[:, None, None]  # (B, 1, 1, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class BERTSelfAttention(nn.Module):
    """Multi-head attention of every position to every real one, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.d_head, self.dropout = config.d_model // config.n_heads, config.attention_dropout
        # Rows ordered head by head (q, k, v of head 0, then of head 1, ...): cut between any two heads it is
        # two smaller layers of the same form. The number of heads is recovered from the width that is there.
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.d_head))  # (B, T, H, 3, Dh)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (B, H, T, Dh)
        y = bidirectional_attention(q, k, v, real, self.dropout if self.training else 0.0)  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class BERTFeedForward(nn.Module):
    """(B, T, D) -> (B, T, D); the exact GELU."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class BERTBlock(nn.Module):
    """One post-norm layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.attention = BERTSelfAttention(config)
        self.norm1 = nn.LayerNorm(config.d_model, NORM_EPS)
        self.mlp = BERTFeedForward(config)
        self.norm2 = nn.LayerNorm(config.d_model, NORM_EPS)
        self.dropout = config.dropout

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """``real`` (B, T) bool: False on padding, which nobody looks at; None: no padding."""
        x = self.norm1(x + F.dropout(self.attention(x, real), self.dropout, self.training))
        return self.norm2(x + F.dropout(self.mlp(x), self.dropout, self.training))


@torch.no_grad()
def _initialise(module: nn.Module, std: float, generator: torch.Generator | None) -> None:
    """Weights from N(0, std^2), biases 0, LayerNorms (1, 0).   google-research/bert"""
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif "norm" in name:
            p.fill_(1.0)
        else:
            p.normal_(0.0, std, generator=generator)


class _Pretrained(nn.Module):
    """What the encoder and the models on top of it share: a config, and Hugging Face's format both ways."""

    architecture: str  # transformers' class for the same

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls, directory: str | Path):
        """A model in fp32, in evaluation mode, from ``config.json`` and ``model.safetensors`` or its shards as
        transformers' class ``architecture`` saves them. ValueError for another model or a damaged file; it names
        every tensor that is missing, misshapen or none of this model's.
        """
        directory = Path(directory)
        config, theirs = _read_config(directory), _read_tensors(directory)
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            model = cls(config)
        wanted = {name: shape for _, p, names in _hugging_face(model) for name in names
                  for shape in [(p.size(0) // len(names), *p.shape[1:])]}
        # Copies of tied tensors, and a buffer that holds 0, 1, 2, ..., in files of older versions.
        for copied, original in {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                                 "cls.predictions.decoder.bias": "cls.predictions.bias"}.items():
            if original in wanted and copied in theirs and original in theirs:
                if not torch.equal(theirs.pop(copied), theirs[original]):
                    raise ValueError(f"{directory}: {copied} is not the same as {original}: BERT ties them")
        positions = theirs.get("embeddings.position_ids")
        if positions is not None and torch.equal(positions.flatten(), torch.arange(positions.numel())):
            del theirs["embeddings.position_ids"]
        problems = [f"{name} is missing" for name in wanted if name not in theirs]
        problems += [f"{name} is none of {cls.__name__}'s" for name in theirs if name not in wanted]
        problems += [f"{name} has shape {tuple(theirs[name].shape)}, config.json says {shape}"
                     for name, shape in wanted.items() if name in theirs and theirs[name].shape != shape]
        if problems:
            raise ValueError(f"{directory} (of {cls.architecture}?): {'; '.join(problems)}")
        state = {}
        for name, _, names in _hugging_face(model):
            w = torch.cat([theirs.pop(their_name).float() for their_name in names])
            if len(names) == 3:
                w = w.unflatten(0, (3, config.n_heads, -1)).transpose(0, 1).flatten(0, 2)  # by head
            state[name] = w.contiguous()
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` as transformers' class ``architecture`` reads them."""
        directory, tensors, save_file = Path(directory), {}, _safetensors().torch.save_file
        prefix = "" if isinstance(self, BERT) else "bert."
        for _, p, names in _hugging_face(self):
            w = p.detach().cpu()
            if len(names) == 3:
                w = w.unflatten(0, (self.config.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            for their_name, part in zip(names, w.chunk(len(names))):
                own = their_name.startswith(("cls.", "classifier.", "qa_outputs."))
                tensors[their_name if own else prefix + their_name] = part.clone(memory_format=torch.contiguous_format)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        sizes = {theirs: getattr(self.config, ours) for theirs, ours in _HUGGING_FACE_SIZES.items()}
        labels = {str(i): f"LABEL_{i}" for i in range(self.config.n_labels)}
        form = {"architectures": [self.architecture], "pad_token_id": 0,
                "id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
        (directory / "config.json").write_text(json.dumps(_HUGGING_FACE_FORM | sizes | form, indent=2) + "\n")


class BERT(_Pretrained):
    """The encoder; ``generator`` draws the weights. ``pooler=False``: without W_p, for spans and tags."""

    architecture = "BertModel"
    # How tensor parallelism cuts each parameter: by output columns, by input rows, by vocabulary.
    tp_plan = {"token_embedding.weight": "vocab", "mlm_bias": "vocab",  # the latter in BERTForPretraining alone
               "attention.qkv.weight": "column", "attention.qkv.bias": "column",
               "mlp.up.weight": "column", "mlp.up.bias": "column",
               "attention.out.weight": "row", "mlp.down.weight": "row"}

    def __init__(self, config: BERTConfig, generator: torch.Generator | None = None, pooler: bool = True):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.segment_embedding = nn.Embedding(config.n_segments, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, NORM_EPS)
        self.blocks = nn.ModuleList(BERTBlock(config) for _ in range(config.n_layers))
        self.pooler = nn.Linear(config.d_model, config.d_model) if pooler else None
        _initialise(self, config.initializer_range, generator)

    def embed(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens, segments (B, T) -> x (B, T, D); segments None: all 0. ValueError for what does not fit."""
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be (B, T) and not empty, got shape {tuple(tokens.shape)}")
        segments = torch.zeros_like(tokens) if segments is None else segments
        if segments.shape != tokens.shape:
            raise ValueError(f"tokens {tuple(tokens.shape)} and segments {tuple(segments.shape)} do not fit")
        if (T := tokens.size(1)) > self.config.context:
            raise ValueError(f"a sequence of {T} tokens does not fit a context of {self.config.context}")
        for what, ids, size in (("token", tokens, self.config.vocab_size),
                                ("segment", segments, self.config.n_segments)):
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= size:
                raise ValueError(f"{what} ids {low} .. {high} are not all in 0 .. {size - 1}")
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T] + self.segment_embedding(segments)
        return F.dropout(self.norm(x), self.config.dropout, self.training)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """tokens, segments (B, T), real (B, T) bool, False on padding (None: there is none) -> x (B, T, D)."""
        if real is not None and (real.shape != tokens.shape or real.dtype != torch.bool):
            raise ValueError(f"real must be bool of shape {tuple(tokens.shape)}, got {real.dtype} {tuple(real.shape)}")
        if real is not None and not (filled := real.any(1)).all():  # its softmax would be NaN
            raise ValueError(f"row {filled.tolist().index(False)} is nothing but padding")
        x = self.embed(tokens, segments)
        for block in self.blocks:
            x = block(x, real)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """The text as one vector, from its [CLS]: x (B, T, D) -> (B, D)."""
        return torch.tanh(self.pooler(x[:, 0]))


# --- 3. the tasks: one layer each on top ----------------------------------------------------

class BERTForPretraining(_Pretrained):
    """Both tasks of section 3.1; ``bert`` is the encoder to keep."""

    architecture, tp_plan = "BertForPreTraining", BERT.tp_plan

    def __init__(self, config: BERTConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        self.bert = BERT(config, generator)
        self.mlm = nn.Linear(config.d_model, config.d_model)
        self.mlm_norm = nn.LayerNorm(config.d_model, NORM_EPS)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.nsp = nn.Linear(config.d_model, 2)
        _initialise(self.mlm, config.initializer_range, generator)
        _initialise(self.nsp, config.initializer_range, generator)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None,
                hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> masked (B, T, V), next (B, 2): logits that B does, and does not, follow A.

        hidden (B, T) bool: compute logits at these N positions alone, (N, V): 15% of the work of the widest layer.
        """
        x = self.bert(tokens, segments, real)
        y = x if hidden is None else x[hidden]  # (N, D)
        y = self.mlm_norm(F.gelu(self.mlm(y)))
        return F.linear(y, self.bert.token_embedding.weight, self.mlm_bias), self.nsp(self.bert.pool(x))


class _Task(_Pretrained):
    """An encoder and one new linear layer. ``encoder``: a pre-trained one, which is copied; None: a new one."""

    tp_plan, pooler, their_head = BERT.tp_plan, False, "classifier"

    def __init__(self, config: BERTConfig, encoder: BERT | None = None, generator: torch.Generator | None = None):
        super().__init__(config)
        self.bert = BERT(config, generator, self.pooler)
        self.head = nn.Linear(config.d_model, 2 if isinstance(self, BERTSpans) else config.n_labels)
        _initialise(self.head, config.initializer_range, generator)
        if encoder is not None:
            theirs, ours = encoder.state_dict(), self.bert.state_dict()
            if wrong := [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]:
                raise ValueError(f"the encoder is none of this config: {', '.join(wrong)}")
            self.bert.load_state_dict({name: theirs[name] for name in ours})


class BERTClassifier(_Task):
    """Sentence pairs and single sentences: a label for the whole.   figure 4 (a), (b)"""

    architecture, pooler = "BertForSequenceClassification", True

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """-> logits (B, n_labels)."""
        x = self.bert.pool(self.bert(tokens, segments, real))
        return self.head(F.dropout(x, self.config.dropout, self.training))


class BERTSpans(_Task):
    """Question answering: where in the passage the answer starts and ends.   section 4.2, figure 4 (c)"""

    architecture, their_head = "BertForQuestionAnswering", "qa_outputs"

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """-> (B, T, 2), scores of every position as start and as end."""
        return self.head(self.bert(tokens, segments, real))


class BERTTagger(_Task):
    """Single-sentence tagging: a label for every token.   section 5.3, figure 4 (d)"""

    architecture = "BertForTokenClassification"

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """-> logits (B, T, n_labels)."""
        x = self.bert(tokens, segments, real)
        return self.head(F.dropout(x, self.config.dropout, self.training))


# --- 4. Hugging Face's names ----------------------------------------------------------------

_HUGGING_FACE_SIZES = {"vocab_size": "vocab_size", "max_position_embeddings": "context",
                       "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "hidden_size": "d_model",
                       "intermediate_size": "d_ff", "type_vocab_size": "n_segments", "hidden_dropout_prob": "dropout",
                       "attention_probs_dropout_prob": "attention_dropout", "initializer_range": "initializer_range"}
_HUGGING_FACE_FORM = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": NORM_EPS, "is_decoder": False,
                      "position_embedding_type": "absolute", "tie_word_embeddings": True}  # what is computed here


def _hugging_face(model: _Pretrained) -> list[tuple[str, Tensor, list[str]]]:
    """Our name, parameter, their names without "bert.": one, or three for what ``qkv`` holds together."""
    found = []
    for name, p in model.named_parameters():
        theirs = name.removeprefix("bert.")
        for ours, replacement in (
                ("token_embedding", "embeddings.word_embeddings"),
                ("segment_embedding", "embeddings.token_type_embeddings"),
                ("position_embedding", "embeddings.position_embeddings"),
                ("attention.out.", "attention.output.dense."),
                ("mlm_bias", "cls.predictions.bias"), ("mlm_norm", "cls.predictions.transform.LayerNorm"),
                ("mlm.", "cls.predictions.transform.dense."), ("nsp", "cls.seq_relationship"),
                ("norm1", "attention.output.LayerNorm"), ("norm2", "output.LayerNorm"), ("blocks", "encoder.layer"),
                ("mlp.up", "intermediate.dense"), ("mlp.down", "output.dense"), ("pooler", "pooler.dense")):
            theirs = theirs.replace(ours, replacement)
        theirs = re.sub(r"^norm\b", "embeddings.LayerNorm", theirs)
        theirs = re.sub(r"^head\b", getattr(model, "their_head", ""), theirs)
        parts = ("self.query", "self.key", "self.value") if ".qkv." in theirs else ("qkv",)
        found.append((name, p, [theirs.replace("qkv", part) for part in parts]))
    return found


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("this needs the safetensors package: pip install safetensors") from None
    return safetensors


def _read_config(directory: Path) -> BERTConfig:
    try:
        theirs = json.loads((directory / "config.json").read_text())
        sizes = {ours: theirs[key] for key, ours in _HUGGING_FACE_SIZES.items() if key in theirs}
        config = BERTConfig(**sizes, n_labels=len(theirs.get("id2label") or "01"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} is no Hugging Face BERT: config.json: {error}") from None
    for key, value in _HUGGING_FACE_FORM.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{directory}: config.json has {key} = {theirs[key]!r}, BERT computes {value!r}")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safetensors, tensors, whole = _safetensors(), {}, directory / "model.safetensors"
    for file in [whole] if whole.exists() else sorted(directory.glob("model-*.safetensors")):
        try:
            tensors |= safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: {error}: damaged or cut short, copy it again") from None
    if not tensors:
        raise ValueError(f"{directory}: no model*.safetensors is there: copy it beside config.json")
    # The first published files call LayerNorm's parameters gamma and beta.
    return {name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
            .replace("LayerNorm.beta", "LayerNorm.bias"): w for name, w in tensors.items()}


# --- 5. demo --------------------------------------------------------------------------------

def main(steps: int, examples: int, seed: int, out: str | None) -> None:
    if steps < 1 or examples < 1 or not 0 <= seed < 2**32:
        raise ValueError("--steps and --examples must be at least 1 and --seed in 0 .. 2^32 - 1, "
                         f"got {steps}, {examples} and {seed}")
    from data import default_documents
    from finetune import compare, hold_out, make_tasks
    from masked_lm import pretrain, pretraining_accuracy, pretraining_batches, split_sentences
    from wordpiece import WordPiece, train_wordpiece
    began = time.perf_counter()
    train, test = hold_out(default_documents())
    tokenizer = WordPiece(train_wordpiece(train, 2048))
    if out is not None:  # at once: what cannot be saved is known before the work is done
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{out}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None
        _safetensors()
        tokenizer.save(Path(out) / "vocab.txt")
    known, new = ([[tokenizer.encode(part) for part in split_sentences(text)] for text in texts]
                  for texts in (train, test))
    config = BERTConfig(len(tokenizer), context=64, n_layers=2, n_heads=4, d_model=128, dropout=0.0,
                        attention_dropout=0.0, initializer_range=0.04)
    model = BERTForPretraining(config, torch.Generator().manual_seed(seed))
    counts, held_out = (Counter(i for text in texts for ids in text for i in ids) for texts in (known, new))
    print(f"{counts.total():,} tokens of Python's documentation, and the end of each document held out, "
          f"{held_out.total():,}; {sum(p.numel() for p in model.parameters()):,} parameters")

    def batches(documents: list, batch: int):
        return pretraining_batches(documents, tokenizer, len(tokenizer), config.context, batch, seed)

    def report(step: int, loss: float) -> None:
        if step == 1 or step % 200 == 0:
            expected = f"  (expected ln V + ln 2 = {math.log(2 * len(tokenizer)):.3f})" if step == 1 else ""
            seconds = time.perf_counter() - began
            print(f"step {step:>6}/{steps}  loss {loss:.3f}  {seconds:4.0f} s{expected}", flush=True)

    pretrain(model, batches(known, 24), steps, 2e-3, report)
    masked, following = pretraining_accuracy(model, batches(new, 16), 60)
    share = torch.cat([labels for *_, labels in islice(batches(new, 16), 60)]).float().mean().item()
    commonest = counts.most_common(1)[0][0]
    print(f"held out: {masked:.1%} of hidden tokens right (guessing {tokenizer.tokens[commonest]!r}: "
          f"{held_out[commonest] / held_out.total():.1%}), {following:.1%} of pairs "
          f"(always the same answer: {max(share, 1 - share):.1%})")
    for text in ("Return [MASK] if the object is a string, [MASK] otherwise.", "Read the [MASK] from a file."):
        tokens = torch.tensor([[tokenizer.cls, *tokenizer.encode(text, allow_special=True), tokenizer.sep]])
        with torch.no_grad():
            logits = model(tokens, hidden=tokens == tokenizer.mask)[0]  # (N, V)
        guesses = [" ".join(tokenizer.tokens[i] for i in row.topk(4).indices) for row in logits]
        print(f"    {text}   {' | '.join(guesses)}")
    if out is not None:
        model.save_pretrained(out)
        print(f"saved: {out}")

    def build(task, encoder: BERT | None) -> _Task:
        task_config = replace(config, n_labels=task.n_labels, dropout=0.1)
        return globals()[task.head](task_config, encoder, torch.Generator().manual_seed(seed))

    torch.manual_seed(seed)  # of dropout
    tasks = make_tasks(train, test, tokenizer, config.context, examples, seed)
    scores = compare(tasks, build, model.bert, tokenizer, seed)
    won = sum(row[2] > max(row[:2]) for row in scores)
    print("transfer: pre-training is ahead of the baseline and of training from scratch on "
          f"{won} of {len(scores)} tasks (expected 4); {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=1900, help="of pre-training (default %(default)s)")
    parser.add_argument("--examples", type=int, default=500,
                        help="labelled rows of each task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and tasks (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="save the pre-trained model and vocab.txt there")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
