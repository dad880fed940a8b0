"""Pictures that are unlike those a model was calibrated on, for which no guarantee holds: told by the vision tower.

The distance is Mahalanobis', as Lee et al. (arXiv 1807.03888) take it from several layers, of one Gaussian, because
pictures have no classes here. A covariance of thousands of values cannot be had from hundreds of pictures: it is that
of a probabilistic PCA (Tipping and Bishop, Journal of the Royal Statistical Society B 61, 1999), which keeps the
largest directions and takes all others for equally wide.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch.nn.functional import normalize

from .conformal import conformal_threshold, fewest_pictures


FALSE_ALARMS = 0.01  # of pictures like those calibrated on
FEWEST_PICTURES = 2 * fewest_pictures(FALSE_ALARMS)  # half of them fit the Gaussian, the others give the threshold
_LAYERS, _DIRECTIONS = 4, 64


@torch.no_grad()
def picture_features(model, pixel_values: torch.Tensor) -> np.ndarray:
    """What the vision tower sees of whole pictures.

    Args:
        model: with a vision tower.
        pixel_values (`(pictures, tiles, 3, height, width)`): as the processor returns them; the first tile is the whole
            picture.

    Returns:
        float64 `(pictures, features)`: of up to four layers, evenly spread, the mean direction of the patches.
    """
    pixels = pixel_values[:, 0].to(model.device, model.dtype)
    return tower_features(model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states)


def tower_features(states: Sequence[torch.Tensor]) -> np.ndarray:
    """[`picture_features`] from the tower's hidden states, `(pictures, patches, width)` each."""
    chosen = np.linspace(0, len(states) - 1, min(_LAYERS, len(states))).round().astype(int)
    means = [normalize(normalize(states[layer].float(), dim=-1).mean(dim=1), dim=-1) for layer in chosen]
    return torch.cat(means, dim=1).double().cpu().numpy()


def count_features(config) -> int:
    """How many [`picture_features`] a model of this configuration has."""
    tower = config.vision_config
    return 0 if config.text_only else min(_LAYERS, tower.num_hidden_layers + 1) * tower.hidden_size


def encode(array: np.ndarray) -> str:
    """float16 values as base64."""
    return base64.b64encode(array.astype("<f2").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """The values of [`encode`], float64.

    Raises:
        ValueError: if the text is none, or a value is not finite.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(float)
    except binascii.Error as error:
        raise ValueError(f"it is no base64: {error}") from None
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return values


@strict
@dataclass(kw_only=True)
class PictureModel:
    """What pictures look like to the tower, and how far from that they may be.

    Args:
        pictures: how many gave the threshold; those that gave the rest are others.
        threshold: the distance that 99 % of pictures stay within.
        mean, directions: float16 in base64, `(features,)` and `(directions, features)`.
        variances: along the directions.
        rest: the variance along each other direction.
    """

    pictures: int
    threshold: float
    mean: str
    directions: str
    variances: list[float]
    rest: float

    def validate_values(self):
        numbers = (self.threshold, self.rest, *self.variances)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"`threshold`, `variances` and `rest` must be finite and above 0, not {numbers!r:.100}")
        mean, directions = decode(self.mean), decode(self.directions)
        if not len(mean) or len(directions) != len(mean) * len(self.variances):
            raise ValueError(f"`directions` holds {len(directions)} values for {len(self.variances)} directions")
        self._mean, self._directions = mean, directions.reshape(-1, len(mean))

    @classmethod
    def fit(cls, features: np.ndarray, seed: int = 0) -> "PictureModel | None":
        """
        Args:
            features (`(pictures, features)`): of different pictures.
            seed: of which half of them fits the Gaussian.

        Returns:
            `None` for fewer than `FEWEST_PICTURES`.
        """
        if len(features) < FEWEST_PICTURES:
            return None
        order = np.random.default_rng(seed).permutation(len(features))
        fitted, held_out = features[order[: len(order) // 2]], features[order[len(order) // 2 :]]
        mean = fitted.mean(axis=0)
        _, sizes, directions = np.linalg.svd(fitted - mean, full_matrices=False)
        variances, kept = sizes**2 / len(fitted), min(_DIRECTIONS, len(fitted) // 2, features.shape[1] // 2)
        found = cls(
            pictures=len(held_out), threshold=1.0, mean=encode(mean), directions=encode(directions[:kept]),
            variances=variances[:kept].tolist(), rest=float(variances[kept:].sum() / (features.shape[1] - kept)),
        )  # fmt: skip
        found.threshold = conformal_threshold(found.distance(held_out), np.arange(len(held_out)), FALSE_ALARMS)
        return found

    @property
    def num_features(self) -> int:
        return len(self._mean)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distances `(pictures,)` of features `(pictures, features)`."""
        centered = features - self._mean
        along = (centered @ self._directions.T) ** 2
        across = (centered**2).sum(axis=1) - along.sum(axis=1)
        return np.sqrt((along / self.variances).sum(axis=1) + np.maximum(across, 0) / self.rest)


__all__ = [
    "FALSE_ALARMS", "FEWEST_PICTURES", "PictureModel", "count_features", "decode", "encode", "picture_features",
    "tower_features",
]  # fmt: skip
