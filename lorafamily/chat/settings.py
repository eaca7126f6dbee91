"""The options of the three commands. The classes are the groups in `--help` and in a config file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from lorafamily.errors import DataError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    model: str
    """Folder of a transformers checkpoint, or a name on the hub."""
    dtype: Dtype = "auto"
    """Of the base's weights; auto: bfloat16 on a GPU that has it, float32 elsewhere. Adapters are float32."""
    quantise: Literal["nf4"] | None = None
    """Quantise the base to 4 bits (bitsandbytes)."""
    device: str = "auto"
    """Such as cuda:1 or cpu; auto: the GPU, if there is one."""
    template: str | None = None
    """File with a chat template (Jinja), or "plain"; None: the model's own, and "plain" where it has none."""


@dataclass(frozen=True)
class DataOptions:
    """Rows to train and evaluate on."""

    data: tuple[str, ...]
    """Files (.jsonl, .json, .csv, each also .gz, .parquet), folders of such files, or names on the hub."""
    split: str = "train"
    """Split of data sets on the hub."""
    validation_data: str | None = None
    """Rows to evaluate on, instead of a share of the data."""
    eval_share: float = 0.05
    """Share of the rows kept for evaluation, drawn at random by --seed; 0: none."""
    loss_on: Literal["assistant", "everything"] = "assistant"
    """Which tokens count in the loss: the assistant's, with end-of-turn tokens, or all."""
    length: int = 1024
    """The most tokens of a row, and of a packed row."""
    too_long: Literal["cut", "drop"] = "cut"
    """Cut longer rows to --length tokens, or leave them out."""
    preview: int | None = None
    """Print this many rows, with the tokens that count in the loss in colour, and stop."""


@dataclass(frozen=True)
class MethodOptions:
    """Which adapters; see lorafamily.apply."""

    method: str = "lora"
    """Such as alora, or "lora2+olora"."""
    budget: float | None = None
    """The most trainable adapter parameters, such as 2e6."""
    rank: int | None = None
    """Rank of every adapter, instead of a budget."""
    rank_budget: int | None = None
    """Rank slices of all layers together, instead of a budget."""
    budget_at: Literal["peak", "end"] = "peak"
    """Whether the budget is kept at every step, or only at the end by a method that prunes."""
    targets: tuple[str, ...] = ()
    """Regular expressions for the layers to adapt, or "attention"; none: all linear layers but the head."""
    exclude: tuple[str, ...] = ()
    """Regular expressions for layers to leave out."""
    also_train: tuple[str, ...] = ()
    """Regular expressions for parameters of the base to train too, such as a head."""
    dropout: float = 0.0
    """Probability that an entry of an adapter's input is set to zero in training."""
    dropout_kind: Literal["entries", "features"] = "entries"
    """Drop single entries, or whole features of the batch."""
    method_options: tuple[str, ...] = ()
    """Options of the method, such as alpha=32 rounds=4."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `lorafamily.apply` and `lorafamily.plan`.

        Raises:
            DataError: an option of the method has no value.
        """
        given: dict[str, Any] = {**vars(self)}
        for option in given.pop("method_options"):
            name, equals, value = option.partition("=")
            if not equals:
                raise DataError(f"--method-options {option}: must be name=value, such as alpha=32")
            given[name.replace("-", "_")] = yaml.safe_load(value)
        for name in ("targets", "exclude", "also_train"):
            words = given[name] in (("attention",), ("all-linear",))  # that `apply` takes as a string
            given[name] = given[name][0] if words else list(given[name]) or None
        return given


@dataclass(frozen=True)
class BatchOptions:
    """How rows become batches."""

    batch: int = 8
    """Rows of a batch; with --pack, packed rows."""
    pack: bool = False
    """Put several rows into one of --length tokens, without attention between them."""
    accumulate: int = 1
    """Batches per optimizer step."""
    chunk: int = 256
    """Tokens whose logits are in memory at a time; 0: all at once, with the model's own loss."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How long and how fast; see lorafamily.train."""

    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    epochs: float | None = None
    """Passes through the data; None: 3."""
    lr: float | Literal["auto"] | None = None
    """Peak learning rate; None: 0.001. LoRA² and AdaLoRA need more, OLoRA less. auto: as lorafamily.suggest_lr."""
    head_lr: float | None = None
    """Learning rate of what --also-train names; None: ten times --lr."""
    up_lr: float | None = None
    """Learning rate of the up factors (LoRA+)."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    warmup: int | float = 0.06
    """Share of the run, or whole number of steps, in which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Of the learning rate after the warm-up."""
    floor: float = 0.0
    """Share of its peak below which the learning rate does not fall."""
    max_grad_norm: float = 1.0
    """Scale gradients down to this norm; 0: leave them as they are."""
    seed: int = 0
    """Of initialisation, shuffling, dropout and the choice of evaluation rows."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation during the run."""

    evaluate_every: int | None = None
    """Steps between evaluations; None: ten evaluations in the run."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a lower loss."""
    restore_best: bool = False
    """Save the adapter of the best evaluation instead of the last."""
    samples: int = 2
    """Evaluation rows whose answers are generated at each evaluation and shown on TensorBoard."""


@dataclass(frozen=True)
class ExecutionOptions:
    """How a step is computed."""

    precision: Dtype = "auto"
    """Of the computation (autocast); auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    compile: bool = False
    """Run the model through torch.compile."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward instead of keeping them."""
    skip_nonfinite: int = 0
    """How many steps in a row may be skipped because the loss or a gradient is not finite."""
    check_gradients: bool = True
    """Stop with an error if adapters get no gradient."""


@dataclass(frozen=True)
class ResultOptions:
    """What is written, and where."""

    out: Path | None = None
    """Folder of the result; the same command resumes an interrupted run there."""
    save_every: int | None = None
    """Steps between checkpoints; None: ten checkpoints in the run."""
    keep: int = 2
    """How many of the last checkpoints to keep, besides the best."""
    resume: Literal["auto", "anyway"] = "auto"
    """Whether to resume only with the same options, or anyway, for example with more steps."""
    export: tuple[Literal["peft", "serving", "merged", "gguf"], ...] = ()
    """Besides the adapter: a folder for peft, one for inference servers, a merged checkpoint, a GGUF file."""
    dry_run: bool = False
    """Print the memory that the run would need, and stop."""
    json: bool = False
    """Print a JSON object at the end, and no progress."""


@dataclass(frozen=True)
class Train:
    """Fine-tune a causal language model on a file of conversations."""

    model: ModelOptions
    data: DataOptions
    method: MethodOptions = field(default_factory=MethodOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    result: ResultOptions = field(default_factory=ResultOptions)

    @property
    def json(self) -> bool:
        """As for the other commands."""
        return self.result.json

    @property
    def out(self) -> Path:
        """The folder of the result, which `check` makes sure of unless nothing is to be written."""
        assert self.result.out is not None
        return self.result.out


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Options that `generate` and `evaluate` have in common."""

    model: str | None = None
    """Folder or name of the base; None: that of the first adapter's run."""
    max_new: int = 256
    """The most tokens of an answer."""
    dtype: Dtype = "auto"
    """Of the base's weights; auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    quantise: Literal["nf4"] | None = None
    """Quantise the base to 4 bits (bitsandbytes)."""
    device: str = "auto"
    """Such as cuda:1 or cpu; auto: the GPU, if there is one."""
    template: str | None = None
    """File with a chat template, or "plain"; None: that of the first adapter's run, or the model's own."""
    json: bool = False
    """Print a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Generate(Inference):
    """Let a model with an adapter answer."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What the user says, each in a conversation of its own; none: standard input is read."""
    adapter: Path | None = None
    """Folder that lorafamily train or lorafamily.save wrote; none: the base alone."""
    system: str | None = None
    """The system message."""
    temperature: float = 0.0
    """Temperature of the sampling; 0: take the likeliest token each time."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the sampling."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Inference):
    """Loss, perplexity and exact match on a file of conversations, for the base and for each adapter."""

    data: tuple[str, ...]
    """Files, folders of files or names on the hub, as lorafamily train takes them."""
    adapter: tuple[Path, ...] = ()
    """Folders that lorafamily train or lorafamily.save wrote."""
    split: str = "test"
    """Split of data sets on the hub."""
    loss_on: Literal["assistant", "everything"] = "assistant"
    """Which tokens count in the loss: the assistant's, with end-of-turn tokens, or all."""
    length: int = 1024
    """The most tokens of a row; longer ones are cut."""
    batch: int = 8
    """Rows of a batch."""
    generate: int = 50
    """Rows whose last answer is generated and compared with the one in the data; 0: none."""
    chunk: int = 256
    """Tokens whose logits are in memory at a time; 0: all at once."""


EXAMPLES = {
    "train": """Examples:
  lorafamily train --model Qwen/Qwen3-0.6B --data chats.jsonl --method alora --budget 2e6 --out my-adapter
  lorafamily train --model base --data chats.jsonl --preview 3
  lorafamily train --model base --data chats.jsonl --rank 8 --pack --quantise nf4 --dry-run
  lorafamily train --config my-adapter/run.yaml --lr 3e-4 --out another""",
    "generate": """Examples:
  lorafamily generate --model Qwen/Qwen3-0.6B --adapter my-adapter "Hello"
  lorafamily generate --adapter my-adapter --temperature 0.7 --seed 1 "Hello" "What is a rank?"
  echo "Hello" | lorafamily generate --adapter my-adapter""",
    "evaluate": """Examples:
  lorafamily evaluate --model Qwen/Qwen3-0.6B --adapter my-adapter --data test.jsonl
  lorafamily evaluate --adapter one another --data test.jsonl --generate 0""",
}
"""For `--help`."""
