"""pythae's VAE with its trainer and its sampler, a method of `quality.py`.

    python tests/benchmarks/pythae_vae.py SHARDS RUN IMAGES SEED

trains on IMAGES images.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_methods import BATCH, Row, training_splits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Subset

from vae_scale.config.options import EvaluateConfig
from vae_scale.data.images import Rows
from vae_scale.data.shards import ShardSet

PYTHAE_LATENT = 64  # as in its CelebA benchmark
PYTHAE_BATCH = 64  # its default
# Its CelebA configuration uses 1e-4 for 50 epochs of 160,000 images. 1e-3 was better after 1,280 photographs (910 instead of
# 923 nats, and no collapsed latents), but gave NaN after 540,000 images of CIFAR-10.
PYTHAE_LR = 3e-4
PRIOR_FIT_IMAGES = EvaluateConfig().prior_fit_images  # as many as for the mixture of `vae_scale.train`


def pythae_model(side: int) -> Any:
    """Builds pythae's VAE with the ResNet of its CelebA benchmark, for images of `side` pixels instead of 64."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn.benchmarks.celeba import Decoder_ResNet_AE_CELEBA, Encoder_ResNet_VAE_CELEBA

    coarse = side // 16

    class Decoder(Decoder_ResNet_AE_CELEBA):  # whose forward hard-codes a side of 4
        def forward(self, z: Tensor, output_layer_levels: None = None) -> Any:
            hidden = self.layers[0](z).reshape(len(z), 128, coarse, coarse)
            for layer in self.layers[1:]:
                hidden = layer(hidden)
            return ModelOutput(reconstruction=hidden)

    config = VAEConfig(input_dim=(3, side, side), latent_dim=PYTHAE_LATENT)
    encoder, decoder = Encoder_ResNet_VAE_CELEBA(config), Decoder(config)
    features = 128 * coarse**2
    encoder.embedding, encoder.log_var = nn.Linear(features, PYTHAE_LATENT), nn.Linear(features, PYTHAE_LATENT)
    decoder.layers[0] = nn.Linear(PYTHAE_LATENT, features)
    return PythaeVAE(config, encoder=encoder, decoder=decoder)


def load_photos(shards: ShardSet, rows: Rows) -> Tensor:
    """Returns images in [0, 1]: [n, 3, h, w]."""
    return torch.from_numpy(shards.load_images(rows)).permute(0, 3, 1, 2) / 255


def train_pythae(location: str, run: Path, images: int, seed: int) -> None:
    """Trains on `images` images with pythae's trainer and fits its sampler."""
    from pythae.data.preprocessors import DataProcessor
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    torch.manual_seed(seed)
    np.random.seed(seed)  # used by scikit-learn
    shards = ShardSet.open(location)
    train_set = shards.select(*training_splits(shards))
    # One epoch over several permutations, so that the number of images need not be a multiple of the set.
    rows, positions = np.unique(list(RandomSampler(range(len(train_set)), num_samples=images)), return_inverse=True)
    photos = load_photos(train_set, rows)
    model = pythae_model(photos.shape[-1])
    config = BaseTrainerConfig(
        output_dir=str(run / "pythae"),
        num_epochs=1,
        learning_rate=PYTHAE_LR,
        per_device_train_batch_size=PYTHAE_BATCH,
        seed=seed,
    )
    dataset = Subset(DataProcessor.to_dataset(photos), positions.tolist())
    BaseTrainer(model, dataset, training_config=config).train()
    sampler = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=10))
    count = min(len(train_set), PRIOR_FIT_IMAGES)
    sampler.fit(load_photos(train_set, np.linspace(0, len(train_set) - 1, count).astype(np.int64)))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, run / "model.safetensors")
    mixture = {name: getattr(sampler.gmm, name) for name in ("weights_", "means_", "covariances_")}
    save_file({name: torch.from_numpy(array) for name, array in mixture.items()}, run / "mixture.safetensors")


class Pythae:
    """pythae's VAE and its sampler, for images in [-1, 1]."""

    def __init__(self, run: Path, side: int) -> None:
        from pythae.samplers import GaussianMixtureSampler
        from sklearn.mixture import GaussianMixture

        self.model = pythae_model(side)
        self.model.load_state_dict(load_file(run / "model.safetensors"))
        self.sampler = GaussianMixtureSampler(self.model)  # moves the model to the GPU, in evaluation mode
        self.sampler.gmm = GaussianMixture()
        for name, tensor in load_file(run / "mixture.safetensors").items():
            setattr(self.sampler.gmm, name, tensor.numpy())
        self.sampler.is_fitted = True

    def sample(self, indices: range, row: Row, seed: int) -> Tensor:
        """Samples from the mixture, with random numbers that depend on the first index."""
        self.sampler.gmm.random_state = np.random.RandomState([seed, indices.start])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(indices), generator=generator)  # scikit-learn sorts by component
        return self.sampler.sample(len(indices), batch_size=BATCH).cpu()[order] * 2 - 1

    def reconstruct(self, images: Tensor) -> Tensor:
        """Decodes the mean of the posterior of each image."""
        encoded = self.model.encoder((images + 1) / 2)
        return self.model.decoder(encoded.embedding).reconstruction * 2 - 1


if __name__ == "__main__":
    train_pythae(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
