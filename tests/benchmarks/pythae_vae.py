"""pythae's VAE with its trainer and its sampler, a method of `quality.py`.

    python tests/benchmarks/pythae_vae.py SHARDS RUN IMAGES SEED

trains on IMAGES images.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_methods import BATCH, Row, batches
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Subset

from vae_scale.data.shards import ShardSet
from vae_scale.models.likelihoods import LEVELS, bits_per_dim

PYTHAE_LATENT = 64  # as in its CelebA benchmark
PYTHAE_BATCH = 64  # its default
# Its CelebA configuration uses 1e-4 for 50 epochs of 160,000 images. With few steps, 1e-3 is better: after 1,280 photographs
# the loss was 910 instead of 923 nats, and the latents did not collapse.
PYTHAE_LR = 1e-3


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


def train_pythae(shards: Path, run: Path, images: int, seed: int) -> None:
    """Trains on `images` images with pythae's trainer and fits its sampler."""
    from pythae.data.preprocessors import DataProcessor
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    torch.manual_seed(seed)
    np.random.seed(seed)  # used by scikit-learn
    train_set = ShardSet.open(shards).select("train", "unlabeled")
    photos = torch.from_numpy(train_set.load_images(np.arange(len(train_set)))).permute(0, 3, 1, 2) / 255
    model = pythae_model(photos.shape[-1])
    # One epoch over several permutations, so that the number of images need not be a multiple of the set.
    rows = list(RandomSampler(range(len(photos)), num_samples=images))
    config = BaseTrainerConfig(
        output_dir=str(run / "pythae"),
        num_epochs=1,
        learning_rate=PYTHAE_LR,
        per_device_train_batch_size=PYTHAE_BATCH,
        seed=seed,
    )
    BaseTrainer(model, Subset(DataProcessor.to_dataset(photos), rows), training_config=config).train()
    sampler = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=10))
    sampler.fit(photos)
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

    def sample(self, num: int, row: Row, seed: int) -> Tensor:
        self.sampler.gmm.random_state = np.random.RandomState(seed)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))  # scikit-learn sorts by component
        return self.sampler.sample(num, batch_size=BATCH).cpu()[order] * 2 - 1

    def reconstruct(self, images: Tensor) -> Tensor:
        encoded = self.model.encoder((images + 1) / 2)
        return self.model.decoder(encoded.embedding).reconstruction * 2 - 1

    def bits_per_dim(self, held_out: ShardSet, seed: int) -> float | None:
        """Adds the normalizing constant, in grey levels, to its loss, the energy of N(x; y, 1) for images in [0, 1]."""
        torch.manual_seed(seed)
        photos = held_out.load_images(np.arange(len(held_out)))
        dimensions = photos[0].size
        nats = dimensions * (0.5 * math.log(2 * math.pi) + math.log(LEVELS - 1))
        for part in batches(photos):
            nats += float(self.model({"data": (part + 1) / 2}).loss) * len(part) / len(photos)
        return bits_per_dim(nats, dimensions)


if __name__ == "__main__":
    train_pythae(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
