"""ONNX Runtime: a bundle's graphs, on the CPU, or on a GPU where its CUDA provider is installed.

Graphs and weights reach the library as bytes that the bundle has verified. A graph that names weights in a file is
given those of the artefact's own files and nothing else: ONNX Runtime would otherwise open whatever path it names.

A session's threads are fixed when it is made, and its result's last bits may depend on them. So there is one session
per stage and thread count, and a call says how many it wants, as for the torch backend.
"""

from __future__ import annotations

import os
import threading

import onnxruntime
import torch
from torch import Tensor

from pylumiere.backends.artefacts import DTYPES, ArtefactBackend, cut
from pylumiere.backends.choice import Choice
from pylumiere.checkpoints.bundle import Artefact, Bundle
from pylumiere.errors import BundleError
from pylumiere.networks.text import encode_ids, load_tokenizer

# Element types as onnx.TensorProto numbers them, which is how an IO binding is told about bfloat16 too.
_ELEMENTS = {"fp32": 1, "int32": 6, "int64": 7, "bool": 9, "fp16": 10, "bf16": 16}
_GRAPH_TYPES = {"fp32": "tensor(float)", "int32": "tensor(int32)", "int64": "tensor(int64)", "bool": "tensor(bool)",
                "fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}  # fmt: skip
_NO_FILE = "no-external-data"


class OnnxRuntimeBackend(ArtefactBackend):
    """The networks of a bundle as ONNX graphs. Calls may come from any thread.

    Attributes:
        device, dtype: where and in what number format the networks compute. Samples and predictions are float32.
        num_threads: of one call on the CPU, where the call does not say.
        weight_bytes: of the graphs' files.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, artefacts: dict[str, Artefact], choice: Choice):
        super().__init__(bundle.config)
        self.device, self.dtype = choice.device, choice.dtype
        self.num_threads = torch.get_num_threads()
        self._graphs = {stage: Graph(bundle, a, choice.device) for stage, a in artefacts.items() if stage != "text"}
        self.weight_bytes = sum(graph.file_bytes for graph in self._graphs.values())
        for graph in self._graphs.values():
            # An engine computes two rows side by side, each with half of the threads.
            graph.session(max(1, self.num_threads // 2) if self.device.type == "cpu" else 1)

    def artefact(self, stage: str) -> Artefact:
        return self._graphs[stage].artefact

    def run(self, stage, operands, shape, piece, num_threads) -> Tensor:
        return self._graphs[stage].run(operands, shape, num_threads or self.num_threads)


class Graph:
    """An ONNX artefact and its sessions, one per thread count."""

    def __init__(self, bundle: Bundle, artefact: Artefact, device: torch.device):
        self.artefact, self.device = artefact, device
        self.file_bytes = sum(bundle.manifest.files[name].size for name in artefact.files)
        self._bundle = bundle
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()

    def session(self, num_threads: int) -> onnxruntime.InferenceSession:
        """Raises IntegrityError where the files changed since the bundle was opened; BundleError where they are bad."""
        with self._lock:
            if num_threads not in self._sessions:
                graph = self._bundle.read(self.artefact.files[0])
                data = {name: self._bundle.read(name) for name in self.artefact.files[1:]}
                self._sessions[num_threads] = open_session(self.artefact, graph, data, num_threads, self.device)
            return self._sessions[num_threads]

    def run(self, operands: dict[str, Tensor], shape: tuple[int, ...], num_threads: int) -> Tensor:
        """The first output in float32, of this shape. Operands: contiguous, of the inputs' dtypes, on the device."""
        session = self.session(num_threads if self.device.type == "cpu" else 1)
        spec = self.artefact.outputs[0]
        out = torch.empty(shape, dtype=DTYPES[spec.dtype], device=self.device)
        place, index = self.device.type, self.device.index or 0
        binding = session.io_binding()
        for given in self.artefact.inputs:
            tensor = operands[given.name]
            binding.bind_input(given.name, place, index, _ELEMENTS[given.dtype], list(tensor.shape), tensor.data_ptr())
        binding.bind_output(spec.name, place, index, _ELEMENTS[spec.dtype], list(shape), out.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the operands were written on torch's stream
        session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        return out.float()


def open_session(
    artefact: Artefact, graph: bytes, data: dict[str, bytes], num_threads: int, device: torch.device
) -> onnxruntime.InferenceSession:
    """A session from verified bytes.

    Raises:
        BundleError: ONNX Runtime refuses the graph, or its inputs and outputs are not those of the manifest.
    """
    onnxruntime.disable_telemetry_events()  # it would keep a database in the user's cache folder
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # its errors are raised; we say them in one line
    # Waiting threads that spin take the cores from the other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    folder = os.path.dirname(artefact.files[0])
    names = {os.path.relpath(name, folder): content for name, content in data.items()}
    names = names or {_NO_FILE: b"\0"}  # with an empty table ONNX Runtime would look for files itself
    options.add_external_initializers_from_files_in_memory(
        list(names), list(names.values()), [len(content) for content in names.values()]
    )
    providers: list = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # its exceptions share no base
        text = " ".join(str(error).split())[:300]
        raise BundleError(f"artefact {artefact.name} is refused by ONNX Runtime: {text}") from None
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise BundleError(f"artefact {artefact.name}: ONNX Runtime could not start its CUDA provider")
    for kind, expected, found in (
        ("input", artefact.inputs, session.get_inputs()),
        ("output", artefact.outputs, session.get_outputs()),
    ):
        promised = {spec.name: _GRAPH_TYPES[spec.dtype] for spec in expected}
        there = {node.name: node.type for node in found}
        if promised != there:
            raise BundleError(f"artefact {artefact.name}: the manifest says {kind}s {promised}, the graph has {there}")
    return session


class OnnxTextEncoder:
    """A text encoder from a bundle: a tokenizer and a graph, on the CPU. See `text.TextEncoder`."""

    def __init__(self, bundle: Bundle, artefact: Artefact):
        text = bundle.manifest.text
        self.name, self.width, self.max_length = text.kind, text.width, bundle.config.text_tokens
        self._tokenizer = load_tokenizer(bundle.read(text.tokenizer), self.max_length)
        self._graph = Graph(bundle, artefact, torch.device("cpu"))
        self._num_threads = torch.get_num_threads()
        self._graph.session(self._num_threads)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`."""
        tokens = [encode_ids(self._tokenizer, prompt, self.max_length) for prompt in prompts]
        rows = [self.encode_tokens(torch.tensor([ids]), torch.tensor([mask])) for ids, mask in tokens]
        mask = torch.tensor([mask for _, mask in tokens]).bool()
        return torch.cat(rows), torch.ones_like(mask) if self.name == "clip" else mask

    def encode_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [1, L, D] of one prompt's numbers and mask [1, L], int64; the graph gets what it asks for."""
        specs = {spec.name: spec for spec in self._graph.artefact.inputs}
        given = {n: t for n, t in {"input_ids": ids, "attention_mask": mask}.items() if n in specs}
        cut(self._graph.artefact, {name: tensor.shape for name, tensor in given.items()})
        given = {name: tensor.to(DTYPES[specs[name].dtype]).contiguous() for name, tensor in given.items()}
        return self._graph.run(given, (1, ids.shape[1], self.width), self._num_threads)
