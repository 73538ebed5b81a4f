"""Eager PyTorch on CPU or GPU: the networks as they are defined, prepared once for the device.

Weights are laid out channels-last, so that the convolutions see operands of one layout and reorder nothing. The thread
count is fixed when the backend is made, because a result's last bits may depend on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pylumiere.backends.choice import Choice
from pylumiere.backends.cpu_ops import CpuOps
from pylumiere.checkpoints.adapters import AdapterChoice, fingerprint
from pylumiere.checkpoints.native import Checkpoint
from pylumiere.config import DECODER
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import AnyConfig, build_network, computing_dtype
from pylumiere.networks.ops import PlainOps

STYLED_NETWORKS = 4  # kept; each holds the weights that its style changes


class TorchBackend:
    """The networks of a checkpoint on one device. Immutable; calls may come from any thread.

    Attributes:
        device, dtype: where and in what number format the networks compute. Samples and predictions are float32.
        num_threads: of one call on the CPU.
        weight_bytes: of all networks, as they are held.
        packed_bytes: of the copies in oneDNN's layout that the first calls make; CPU only.
        fingerprint: of the first stage's weights; what a style was made for.
    """

    name = "torch"
    takes_styles = True
    can_capture = True  # calls can be captured as CUDA graphs

    def __init__(self, checkpoint: Checkpoint, choice: Choice):
        self.device, self.dtype = choice.device, choice.dtype
        self.num_threads = torch.get_num_threads()
        self._first = checkpoint.config.first.name
        self._networks = {
            name: self._prepare(config, checkpoint.weights[name]) for name, config in checkpoint.config.networks.items()
        }
        tensors = [tensor for network in self._networks.values() for tensor in network.state_dict().values()]
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        on_cpu = self.device.type == "cpu"
        self.packed_bytes = sum(tensor.nbytes for tensor in tensors if tensor.ndim > 1) if on_cpu else 0
        self.fingerprint = fingerprint(checkpoint.weights[self._first])
        self._styled: OrderedDict[AdapterChoice, nn.Module] = OrderedDict()
        self._lock = threading.Lock()

    def _ops(self) -> PlainOps:
        return CpuOps() if self.device.type == "cpu" else PlainOps()

    def _prepare(self, config: AnyConfig, weights: Mapping[str, Tensor]) -> nn.Module:
        dtype = computing_dtype(config, self.dtype)
        prepared = {name: channels_last(tensor.to(self.device, dtype)) for name, tensor in weights.items()}
        network = build_network(config, prepared)
        network.ops = self._ops()
        return network

    def _styled_network(self, choice: AdapterChoice) -> nn.Module:
        """The first network with a style's weights; it shares all weights that the style does not change."""
        with self._lock:
            network = self._styled.get(choice)
            if network is None:
                plain = self._networks[self._first]
                weights = plain.state_dict()
                mixed = choice.weights(weights)
                network = build_network(plain.config, weights | {n: channels_last(w) for n, w in mixed.items()})
                network.ops = plain.ops
                self._styled[choice] = network
                while len(self._styled) > STYLED_NETWORKS:
                    self._styled.popitem(last=False)
            self._styled.move_to_end(choice)
            return network

    @torch.inference_mode()
    def predict(
        self,
        stage: str,
        sample: Tensor,
        timesteps: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        *,
        num_threads: int | None = None,
        style: AdapterChoice | None = None,
    ) -> Tensor:
        """One network call.

        Args:
            stage: its name.
            sample: [B, T, H, W, in_channels] float32, on the device.
            timesteps: [B] float32; one per batch element.
            text, text_mask: [B, L, D] float32 and [B, L] bool, for a network with text.
            noise_level: [B] float32, for a network that takes one.
            num_threads: of this call on the CPU; the backend's own number if None.
            style: weights of the first network to use instead of its own; made at the first call and kept.

        Returns:
            [B, T, H, W, out_channels] float32, contiguous.
        """
        self._use_threads(num_threads)
        network = self._networks[stage] if style is None else self._styled_network(style)
        return network(sample, timesteps, text, text_mask, noise_level).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, num_threads: int | None = None) -> Tensor:
        """Pixels of latents [B, T, h, w, C] float32, on the device: [B, T, H, W, 3] float32 in about -1..1."""
        self._use_threads(num_threads)
        return self._networks[DECODER](latents).contiguous()

    @torch.inference_mode()
    def encode(self, frames: Tensor, *, num_threads: int | None = None) -> Tensor:
        """Latents of pixels [B, T, H, W, 3] float32 in -1..1, on the host: the means of what the encoder gives, as the
        first stage holds them, [B, T, h, w, C] float32, on the host."""
        self._use_threads(num_threads)
        return self._networks[DECODER].encode(frames.to(self.device)).cpu().contiguous()

    def _use_threads(self, num_threads: int | None) -> None:
        num_threads = num_threads or self.num_threads
        if self.device.type == "cpu" and torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)  # per thread of the caller

    def check(self, stage: str, shape: tuple[int, ...]) -> None:
        """Raises InvalidRequest where a sample of this shape cannot be computed; here every one can."""

    def check_encoder(self) -> None:
        """Raises InvalidRequest where `encode` cannot be called: the decoder's family has no encoder."""
        if not hasattr(self._networks[DECODER], "encode"):
            raise InvalidRequest("this model's decoder has no encoder beside it, so no clip can start from a video")


def channels_last(weight: Tensor) -> Tensor:
    """The same weight with its input channels last in memory: [O, C, kh, kw] and [O, C, k] only."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    if weight.ndim == 3:
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight
