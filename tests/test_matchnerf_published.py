"""Published weights in, our state dict out: round trips, and one clear line for every kind of bad file."""

import pytest
import torch

from idnerf.errors import InputError
from idnerf.models.paper import PaperConfig, PaperModel
from idnerf.models.published import (
    convert_checkpoint,
    convert_gmflow,
    convert_matchnerf,
    initialise_encoder,
    published_name,
)
from matchnerf_cases import published_gmflow, published_matchnerf


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("entry", ["model", None])
def test_matchnerf_file_fills_a_whole_model_and_every_tensor_arrives(views, entry, tmp_path):
    tensors = published_matchnerf(views)
    path = tmp_path / "matchnerf.pth"
    torch.save({"model": tensors, "epoch": 7, "iter": 100} if entry else tensors, path)
    kind, fields, ours = convert_checkpoint(path)
    config = PaperConfig(**fields)
    assert kind == "matchnerf"
    assert config.num_views == views and config.published_behaviour and config.view_aggregation == "concatenate"
    model = PaperModel(config)
    model.load_state_dict(ours)
    back = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_gmflow_file_starts_an_encoder_and_leaves_the_rest(tmp_path):
    path = tmp_path / "gmflow_sintel.pth"
    tensors = published_gmflow()
    torch.save({"model": tensors, "step": 3}, path)
    kind, fields, ours = convert_checkpoint(path)
    assert kind == "gmflow"
    model = PaperModel(PaperConfig(**fields))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise_encoder(model, ours)
    for name, tensor in model.state_dict().items():
        if name in ours:
            published = published_name(name).removeprefix("feat_enc.")
            assert torch.equal(tensor, tensors[published]), name
        else:
            assert name.startswith(("encoder.upsampler.", "field.", "aggregation."))
            assert torch.equal(tensor, before[name]), name


def test_weights_saved_by_data_parallel_training_are_read(tmp_path):
    tensors = published_gmflow()
    path = tmp_path / "parallel.pth"
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    plain = convert_gmflow(tensors)
    converted = convert_checkpoint(path)[2]
    assert converted.keys() == plain.keys()
    assert all(torch.equal(converted[name], plain[name]) for name in plain)


def test_parameters_without_a_published_counterpart_are_a_key_error():
    with pytest.raises(KeyError):
        published_name("aggregation.encode_view.0.weight")


def test_missing_unknown_and_misshapen_tensors_are_named():
    missing = published_matchnerf(3)
    del missing["nerf_dec.rgb_linear.bias"]
    with pytest.raises(InputError, match=r"missing nerf_dec\.rgb_linear\.bias, unknown nothing"):
        convert_matchnerf(missing)
    refined = published_gmflow() | {"backbone.trident_conv.weight": torch.zeros(128, 128, 3, 3)}
    with pytest.raises(InputError, match=r"missing nothing, unknown backbone\.trident_conv\.weight"):
        convert_gmflow(refined)
    misshapen = published_matchnerf(3) | {"nerf_dec.rgb_linear.bias": torch.zeros(4)}
    with pytest.raises(InputError, match=r"rgb_linear\.bias of shape \(3,\), got \(4,\)"):
        convert_matchnerf(misshapen)
    odd = published_matchnerf(3) | {"nerf_dec.pts_bias.weight": torch.zeros(128, 21)}
    with pytest.raises(InputError, match="got 21"):
        convert_matchnerf(odd)
    with pytest.raises(InputError, match=r"pts_bias\.weight"):
        convert_matchnerf({"nerf_dec.rgb_linear.bias": torch.zeros(3)})


def test_encoder_of_another_shape_is_refused():
    model = PaperModel(PaperConfig(transformer_layers=2))
    with pytest.raises(InputError, match="transformer_layers"):
        initialise_encoder(model, convert_gmflow(published_gmflow()))


class NotATensor:
    """Unpickling it would run code of the file."""


@pytest.mark.parametrize("case", ["absent", "truncated", "empty", "text", "object", "list", "numbers", "other"])
def test_bad_files_give_one_line_that_names_the_file(case, tmp_path):
    path = tmp_path / "bad.pth"
    good = published_gmflow()
    if case == "truncated":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("<!DOCTYPE html><html>not found</html>")
    elif case != "absent":
        contents = {
            "object": {"model": good, "x": NotATensor()},
            "list": [torch.zeros(2)],
            "numbers": {"lr": 0.1},
        }
        torch.save(contents.get(case, {"conv.weight": torch.zeros(3)}), path)
    with pytest.raises(InputError) as caught:
        convert_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["# Export\n", "a", "t = 1\n", "00", "J", "R", "o", "\x8a\x01a", "bcd", "]K\x01a.", "(lp0\nb", "I1\n."]
)
def test_text_of_any_kind_gives_one_line(text, tmp_path):
    """What its letters mean to a pickle differs, and so does what goes wrong."""
    path = tmp_path / "notes.pth"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        convert_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
