"""Several models in, one model out whose layer i is the mean of theirs: the target of EKD's layerwise average.

Means of fixed features are fixed features: kept in place of what they average, they take the disk of one teacher.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from cache.errors import SettingsError
from cache.publish import digest_json
from pipeline.upstream import Outputs, Upstream


class Blend:
    """The mean of models with as many layers of the same width, as an `Upstream` (Huang et al. 2023, arXiv 2302.12757)."""

    def __init__(self, models: Sequence[Upstream]) -> None:
        """Take models of one shape, on one device.

        Raises:
            SettingsError: fewer than two, or layers that cannot be averaged.
        """
        if len(models) < 2:
            raise SettingsError("a mean needs two models or more; name each with --model")
        shapes = [(model.num_layers, model.width) for model in models]
        if len(set(shapes)) > 1:
            each = ", ".join(f"{layers} layers of width {width}" for layers, width in shapes)
            raise SettingsError(
                f"the models have {each}: there is no mean of them; keep their layers apart and predict each (EKD heads)"
            )
        self.models = tuple(models)
        self.num_layers, self.width = shapes[0]
        self.has_projection = all(model.has_projection for model in models)

    def describe(self) -> dict[str, Any]:
        """See `Upstream`. Their order is left out: it changes the mean by rounding alone."""
        of = sorted((model.describe() for model in self.models), key=digest_json)
        return {
            "kind": "mean",
            "digest": digest_json(of),
            "layers": self.num_layers,
            "width": self.width,
            "num_params": sum(one.get("num_params", 0) for one in of),
            "of": of,
        }

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """Layer by layer the mean over the models, in float32; all count the same frames, whatever their grids."""
        return self.outputs(waves, samples).layers

    def outputs(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """The same with the mean of their projections, where each has one."""
        frames, total = 0, list[Tensor]()
        for model in self.models:
            projection, layers = model.outputs(waves, samples)
            states = [projection, *layers] if self.has_projection and projection is not None else layers
            frames = min(frames or states[0].shape[1], states[0].shape[1])  # beyond the last valid one, models differ
            total = (
                [t[:, :frames] + s[:, :frames].float() for t, s in zip(total, states, strict=True)]
                if total
                else [s.float() for s in states]
            )
        means = [t / len(self.models) for t in total]
        return Outputs(means[0], means[1:]) if self.has_projection else Outputs(None, means)
