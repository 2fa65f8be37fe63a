"""Published weights of Inception v3 through the command and the importer; tests/models has the numbers they give."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.convert import inception
from dalle_jax.errors import UserError
from tests.support.inception_weights import state_dict, torch_names


def test_a_published_file_through_the_command(tmp_path, capsys):
    state = state_dict("fid") | {"AuxLogits.fc.bias": np.zeros(3), "Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(0)}
    save_file({name: np.asarray(value) for name, value in state.items()}, tmp_path / "fid.safetensors")
    words = ["convert", "inception", f"{tmp_path}/fid.safetensors", "--out", f"{tmp_path}/out"]
    assert main.main(words) == 0
    assert "1008 classes" in capsys.readouterr().out
    found = model_dir.load(tmp_path / "out", name="inception")
    array = state["Mixed_6b.branch7x7_2.conv.weight"]
    np.testing.assert_array_equal(found.params["mixed_6b"]["branch7x7_2"]["weight"], array.transpose(2, 3, 1, 0))
    assert main.main(words) == 2 and "a new or empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("Mixed_7c.branch_pool.bn.running_var"), "Mixed_7c.branch_pool.bn.running_var is missing"),
        (lambda s: s.update({"Mixed_8a.x.conv.weight": np.zeros((1, 1, 1, 1))}), "Mixed_8a.x.conv.weight is there too"),
        (lambda s: s.update({"fc.weight": np.zeros((10, 2_048)), "fc.bias": np.zeros(10)}), "10 classes"),
        (lambda s: s.pop("fc.weight"), "no fc.weight"),
        (lambda s: s.update({"Conv2d_1a_3x3.bn.bias": np.full(32, np.nan)}), "Conv2d_1a_3x3.bn.bias"),
        (
            lambda s: s.update({"Conv2d_1a_3x3.bn.bias": np.zeros(31)}),
            r"Conv2d_1a_3x3.bn.bias of shape \(32,\), got \(31,\)",
        ),
    ],
)
def test_wrong_state_dicts_are_refused(damage, message):
    state = {name: np.zeros(shape, np.float32) for name, shape in torch_names("fid").items()}
    damage(state)
    with pytest.raises(UserError, match=message):
        inception.convert(state)
