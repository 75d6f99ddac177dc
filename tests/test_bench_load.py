"""The checkpoints that loading is measured with: in shards, loaded whole in the formats of their config."""

import load as bench
import pytest

from fwd.models.load import load


@pytest.mark.parametrize(("case", "form"), [("8B-like bf16", None), ("8B-like nvfp4", "nvfp4")])
def test_shards_hold_the_whole_model(case, form, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHARD", 100_000)
    monkeypatch.setattr(bench, "BLOCK", 1 << 20)
    files = bench.write(tmp_path, bench.config(case, dry=True))
    assert len(files) > 2
    spec = load(tmp_path, device="cpu", context=64).spec
    assert spec.layers == 2
    found = [spec.quantization.format_of(f"model.layers.1.mlp.{name}_proj") for name in ("up", "down")]
    assert {each and each.format for each in found} == {form}
