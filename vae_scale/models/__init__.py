"""Networks, likelihoods and learned priors. This package depends neither on the data nor on the training loop."""

from vae_scale.models import networks as networks  # registers the networks, for `VAE.from_pretrained`
