"""Ahead-of-time compilation without a GPU: machine code, its facts, the cache, and what is refused."""

import json

import pytest
import torch
from pylumiere.kernels import (
    aot,
    factorized_conv,
    geglu,
    launching,
    layer_norm,
    norm_affine,
    spatial_conv,
    temporal_conv,
    tuning,
)
from pylumiere.kernels.tuning import ARCHITECTURES, SHARED_MEMORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


def convolution(arch, dtype, **options):
    with launching.record(arch) as recording:
        x = torch.empty(1, 4, 32, 32, 64, dtype=dtype, device="meta")
        mul = torch.empty(4, 64, dtype=torch.float32, device="meta")
        weight = spatial_conv.pack_weight(x.new_empty(64, 64, 3, 3))
        spatial_conv.launch(x, weight, None, mul, mul, silu=True, **options)
    return recording.launches[0].specialisation(), arch


@pytest.fixture(scope="module")
def compiled(folder):
    """The fused convolution for every architecture in 16 bits, and for one with the temporal shift."""
    tasks = [convolution(arch, torch.float16) for arch in ARCHITECTURES]
    tasks.append(convolution(90, torch.float16, fold_next=8, fold_prev=8))
    tasks.append(convolution(90, torch.float16, fold_next=5, fold_prev=5))
    names = [*(f"sm{arch}" for arch in ARCHITECTURES), "shift", "unaligned shift"]
    return dict(zip(names, aot.compile_many(tasks, folder=folder), strict=True))


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [(75, "fma"), (80, "mma"), (86, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")],
)
def test_machine_code_for_every_chip(compiled, arch, instruction):
    facts = compiled[f"sm{arch}"]
    assert aot.verdict(facts, arch) == "ok"
    assert facts["instruction"] == instruction
    assert facts["stack"] == facts["local"] == facts["spills"] == 0
    assert 0 < facts["registers"] <= 255
    assert facts["shared"] <= SHARED_MEMORY[arch]
    assert facts["parameters"][:2] == ["x_ptr", "weight_ptr"]
    with open(facts["cubin"], "rb") as file:
        assert file.read(4) == b"\x7fELF"


def test_the_shift_keeps_its_loads_wide(compiled):
    """Whole 16-byte loads as without a shift: the shift costs no memory instruction of its own."""
    assert compiled["shift"]["wide_loads"] == compiled["sm90"]["wide_loads"] > 0
    assert compiled["unaligned shift"]["wide_loads"] < compiled["shift"]["wide_loads"]


def with_ones_as_constants(launch):
    """Triton's launcher compiles integer arguments of value 1 as constants where it specialises; so does this."""
    specialisation = launch.specialisation()
    plain = launching.unspecialised(launching.find_kernel(launch.kernel))
    for name, value in launch.args.items():
        if isinstance(value, int) and value == 1 and name not in plain:
            specialisation["signature"][name] = "constexpr"
            specialisation["constants"][name] = 1
    return specialisation


def test_sizes_of_one_compile_as_constants(folder):
    x = torch.empty(1, 1, 1, 1, 1, device="meta")
    row, weight = torch.empty(1, 1, device="meta"), x.new_empty(1, 1, 3)
    with launching.record(90) as recording:
        spatial_conv.launch(x, x.new_empty(1, 1, 3, 3), x.new_empty(1), row, row, x, True, statistics=True)
        temporal_conv.launch(x, weight, x.new_empty(1), row, row, x, True)
        norm_affine.launch(norm_affine.launch_statistics(x[0, 0]), 1, row[0], row[0], 1, 1e-5, x[0, 0], x[0, 0])
        layer_norm.launch(row, row[0], row[0])
        geglu.launch(row.expand(1, 2))
        half = x.half()
        factorized_conv.launch(half, half.new_empty(1, 1, 3, 3), None, weight.half(), fused=True)
    tasks = [(with_ones_as_constants(launch), 90) for launch in recording.launches]
    assert len(tasks) == 7
    assert [facts.get("error") for facts in aot.compile_many(tasks, folder=folder)] == [None] * 7


def test_compiled_kernels_are_kept(compiled, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    facts = aot.compile_many([convolution(90, torch.float16)] * 2, folder=folder)
    assert facts == [compiled["sm90"]] * 2
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_kernel_that_does_not_compile_is_a_row_not_a_crash(folder):
    specialisation, arch = convolution(90, torch.float16)
    broken = {**specialisation, "signature": {**specialisation["signature"], "H": "*fp16"}}
    (facts,) = aot.compile_many([(broken, arch)], folder=folder)
    assert "error" in facts
    assert aot.verdict(facts, arch) == facts["error"] != "ok"


def test_verdict_names_spills_and_too_much_shared_memory():
    good = {"spills": 0, "local": 0, "shared": 0}
    assert aot.verdict(good, 89) == "ok"
    assert aot.verdict(good | {"spills": 7}, 89) == "7 spill instructions"
    assert aot.verdict(good | {"shared": 144 * 1024}, 89) == "shared memory 147456 of 101376"
    assert aot.verdict(good | {"shared": 144 * 1024}, 90) == "ok"
    assert aot.verdict(good | {"instruction": "mma"}, 90, "wgmma") == "mma instead of wgmma"


def test_products_in_16_bits_must_become_matrix_instructions():
    def expected(dtype, arch):
        with launching.record(arch) as recording:
            x = torch.empty(1, 4, 16, 16, 64, dtype=dtype, device="meta")
            spatial_conv.launch(x, spatial_conv.pack_weight(x.new_empty(64, 64, 3, 3)), statistics=True)
        return [aot.expected_instruction(launch, arch) for launch in recording.launches]

    assert expected(torch.bfloat16, 90) == ["wgmma", None]  # the convolution, and the merge of its statistics
    assert expected(torch.bfloat16, 80)[0] == "mma" and expected(torch.float16, 75)[0] == "fma"
    assert expected(torch.float32, 90) == [None, None]


def test_every_listed_tile_is_compiled(monkeypatch):
    """Each row of the table is what some case or shipped network takes."""
    taken = set()
    choose = tuning.choose

    def note(op, arch, **shape):
        config = choose(op, arch, **shape)
        taken.add(id(config))
        return config

    monkeypatch.setattr(tuning, "choose", note)
    for arch in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16):
            aot.op_launches(arch, dtype)
        aot.network_launches(arch, torch.bfloat16, ["demo-base"])
    for op, by_arch in tuning.TABLE.items():
        for arch in ARCHITECTURES:
            for row in by_arch.get(arch, []):
                assert id(row.config) in taken, f"{op} sm {arch}: {row.config} is in no case"


def test_a_network_needs_each_of_its_kernels_once():
    launches = aot.network_launches(90, torch.bfloat16, ["demo-base"])
    assert len({launch.key() for launch in launches.values()}) == len(launches) < 40
    assert "implicit_gemm_kernel: demo-base T80-H16-C28-O64" in launches


def test_the_command_prints_and_writes_the_table(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "cache_folder", lambda: folder)
    path = tmp_path / "table.json"
    arguments = ["--sku", "sm75", "--dtype", "bf16", "--dtype", "fp16", "--op", "norm_affine", "--json", str(path)]
    assert aot.main(arguments) == 0
    rows = json.loads(path.read_text())
    assert rows[0] == {"case": "all", "dtype": "bf16", "arch": 75, "verdict": "not on this chip"}
    assert {row["verdict"] for row in rows[1:]} == {"ok"}
    assert "not on this chip" in capsys.readouterr().out


def test_unknown_skus_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        aot.main(["--sku", "sm61"])
    assert stop.value.code == 2
    assert "expected all or one of sm75" in capsys.readouterr().err


def test_launches_of_one_name_are_all_compiled():
    launches = aot.op_launches(90, torch.float32, ["groupnorm_silu"])
    folds = [name for name in launches if name.startswith("_fold_kernel: C320")]
    assert folds == ["_fold_kernel: C320-S16384", "_fold_kernel: C320-S16384 (2)"]  # without modulation, and with it
