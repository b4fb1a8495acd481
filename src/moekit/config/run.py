"""A training run: the model, its data, the optimizer and its schedule, and when to save."""

from dataclasses import dataclass, field
from typing import Literal

from moekit.config.errors import ConfigError, check, check_not_negative, check_positive
from moekit.config.model import ModelConfig
from moekit.config.moe import check_router_learns


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One body of text: a file, a folder, or `demo:NAME`."""

    path: str
    """text, JSONL or Parquet file, a folder of them, or demo:code, demo:docs, demo:english, demo:japanese"""
    domain: str = "text"
    """name under which its figures are reported"""
    weight: float = 1.0
    """share of the training tokens, relative to the other sources"""
    column: str = "text"
    """field that holds the text in JSONL and Parquet"""
    valid: str = ""
    """validation file; empty: a share of the documents is held out"""

    def __post_init__(self) -> None:
        check(bool(self.path), "path", "is empty", "name a text, JSONL or Parquet file, or a folder of them")
        check_positive(self, "weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the model reads."""

    sources: tuple[Source, ...] = ()
    """bodies of text"""
    tokenizer: str = "train"
    """a tokenizer.json, or `train` to learn one from the corpus with model.vocab_size tokens"""
    sequence_length: int = 256
    """tokens the model predicts in each sequence"""
    valid_share: float = 0.05
    """share of the documents held out where a source names no validation file"""
    valid_bytes: int = 250_000
    """at most this many bytes of validation text for each domain"""

    def __post_init__(self) -> None:
        check_positive(self, "sequence_length", "valid_bytes")
        check(0 < self.valid_share < 1, "valid_share", f"{self.valid_share} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOptim:
    """What is otherwise with the routers: their centroids, and what their selection rules train."""

    lr: float = 0.0
    """peak learning rate of the routers; 0: that of everything else that AdamW moves"""
    warmup_steps: int = 0
    """steps over which the routers' learning rate rises from 0; 0: as many as for the rest"""

    def __post_init__(self) -> None:
        check_not_negative(self, "lr", "warmup_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How a gradient becomes a step."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the matrices and AdamW for the rest; adamw: AdamW for all"""
    lr: float = 0.004
    """peak learning rate of the matrices (Muon), or of everything (AdamW)"""
    adam_lr: float = 0.01
    """with muon: peak learning rate of embeddings, head, norms and routers"""
    weight_decay: float = 0.01
    """decoupled weight decay of matrices"""
    momentum: float = 0.95
    """Muon's momentum"""
    beta1: float = 0.9
    """AdamW's first moment"""
    beta2: float = 0.95
    """AdamW's second moment"""
    clip: float = 1.0
    """largest norm of the whole gradient; 0: no clipping"""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """after warm-up: stay, then fall linearly (wsd), or fall along a cosine"""
    warmup_steps: int = 20
    """steps over which the learning rate rises from 0"""
    decay_share: float = 0.4
    """share of the steps over which wsd falls"""
    final_share: float = 0.0
    """learning rate at the last step, as a share of the peak"""
    router: RouterOptim = RouterOptim()
    """what is otherwise with the routers"""
    alternate: int = 0
    """freeze the routers for so many steps, then the routed experts for as many, and so on; 0: all learn always"""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "adam_lr")
        check_not_negative(self, "weight_decay", "clip", "warmup_steps", "alternate")
        for key in ("momentum", "beta1", "beta2", "decay_share", "final_share"):
            value = getattr(self, key)
            check(0 <= value <= 1, key, f"{value} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How long, how much at a time, and what is kept."""

    steps: int = 1000
    """optimizer steps"""
    batch: int = 16
    """sequences in a step"""
    micro_batch: int = 0
    """sequences at once; 0: the whole batch. Smaller ones take less memory and give the same gradient"""
    mtp_weight: float = 0.3
    """factor of the multi-token prediction loss"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """type of the computation; auto: bfloat16 where the machine has it. Master weights are float32"""
    fp8: bool = False
    """simulate FP8: weights rounded in 128x128 blocks, activations in 1x128 groups (arXiv 2412.19437, section 3.3)"""
    checkpoint_every: int = 200
    """steps between checkpoints"""
    keep: int = 2
    """newest checkpoints kept, besides the best"""
    validate_every: int = 200
    """steps between validations"""
    tensorboard: bool = False
    """also write TensorBoard events"""

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch", "checkpoint_every", "keep", "validate_every")
        check_not_negative(self, "micro_batch", "mtp_weight")
        divides = self.micro_batch == 0 or self.batch % self.micro_batch == 0
        check(divides, "micro_batch", f"{self.micro_batch} does not divide batch = {self.batch}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """the model"""
    data: DataConfig = DataConfig()
    """the text"""
    optim: OptimConfig = OptimConfig()
    """the optimizer"""
    train: TrainSection = TrainSection()
    """the run"""
    seed: int = 0
    """seed of the weights and of the order of the data"""
    device: str = "cpu"
    """where to compute"""

    def __post_init__(self) -> None:
        if self.model.moe_layers:
            try:
                check_router_learns(self.model.moe)
            except ConfigError as error:
                raise error.inside("model.moe") from None
