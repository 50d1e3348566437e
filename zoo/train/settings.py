"""What a training run is: every number that decides it, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zoo.errors import ZooError, did_you_mean
from zoo.train import schedule

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

FREE_TO_CHANGE = frozenset({"log_every", "checkpoint_every", "threads", "device", "tensorboard", "weights"})
"""Settings that may differ when a run is continued, because they leave the sequence of parameters as it is."""


class TrainSettings(BaseModel):
    """The settings of one run. Shares are parts of `steps`; a step is one change of the parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(description="name of the data set, as `load_data` takes it")
    steps: Count = Field(default=1000, description="optimizer steps")
    batch: Count = Field(default=32, description="samples per step, all accumulated parts together")
    accumulate: Count = Field(default=1, description="parts into which the batch of a step is cut to save memory")
    context: Count | None = Field(default=None, description="tokens per sample; the data set's own default if left out")

    learning_rate: Positive = Field(default=1e-3, description="highest learning rate of the schedule")
    schedule: Literal["cosine", "wsd", "constant"] = Field(default="cosine", description="what follows the warm-up")
    warmup_share: Share = Field(
        default=0.05, description="share of the steps in which the learning rate rises linearly"
    )
    decay_share: Share = Field(default=0.2, description="share of the steps in which `wsd` decays, at the end")
    decay_shape: Literal["linear", "sqrt"] = Field(default="sqrt", description="`wsd` decays by 1-x or by 1-sqrt(x)")
    minimum_ratio: Share = Field(default=0.1, description="last learning rate as a share of the highest")
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="decoupled decay (AdamW)")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="decay rates of AdamW's two moments")
    clip: Positive | None = Field(default=1.0, description="highest norm of the gradient; none: not clipped")
    precision: Literal["32", "bf16", "16"] = Field(default="32", description="bf16 and 16 compute in mixed precision")

    evaluate_every: Count | None = Field(
        default=None, description="steps between evaluations; a tenth of all if left out"
    )
    evaluate_samples: Count = Field(default=256, description="at most so many validation samples, spread evenly")
    patience: Count | None = Field(default=None, description="stop after so many evaluations without a new best")
    checkpoint_every: Count | None = Field(
        default=None, description="steps between checkpoints; `evaluate_every` if left out"
    )
    log_every: Count = Field(default=10, description="steps between rows of metrics.csv")
    weights: Literal["best", "last"] = Field(default="best", description="which weights are written at the end")

    seed: int = Field(default=0, ge=0, lt=2**63, description="decides the order of samples and every random draw")
    threads: int | None = Field(default=None, ge=1, le=4096, description="CPU threads; torch's default if left out")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard event files")

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, for example (0.9, 0.95), not {betas}")
        return betas

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.batch % self.accumulate:
            divisor = max(part for part in range(1, self.accumulate + 1) if self.batch % part == 0)
            raise ValueError(
                f"a batch of {self.batch} cannot be cut into {self.accumulate} equal parts; "
                f"accumulate={divisor} would do"
            )
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} are more than the whole run"
            )
        if self.precision == "16" and self.device == "cpu":
            raise ValueError("precision 16 needs a GPU; on the CPU use bf16 or 32")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings from a mapping. Raises ZooError, with every problem at once, instead of pydantic's own error."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ZooError("\n".join(_explain(problem) for problem in error.errors())) from None

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.evaluate_every or max(1, self.steps // 10)

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every or self.evaluation_interval

    def factor(self, step: int) -> float:
        """The learning rate of a step (from zero) as a share of the highest one."""
        warmup = round(self.steps * self.warmup_share)
        if self.schedule == "cosine":
            return schedule.cosine(step, self.steps, warmup=warmup, minimum=self.minimum_ratio)
        decay = round(self.steps * self.decay_share) if self.schedule == "wsd" else 0
        return schedule.warmup_stable_decay(
            step, self.steps, warmup=warmup, decay=decay, minimum=self.minimum_ratio, shape=self.decay_shape
        )


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown training setting {path!r}{did_you_mean(path, TrainSettings.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"training setting {path!r} is missing: {TrainSettings.model_fields[path].description}"
    return f"{path}: {message}, not {problem['input']!r}" if path else message
