"""The tower of images, beside that of texts: what it sees of an image, what it gives, and the way out and back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data_services.fronts import ImageFront
from data_services.inputs import Routed
from data_services.schema import Media, Undecodable, UsageError
from data_services.tokenizer import FolderTokenizer
from tests.trainers.encoders.tiny import TEXTS, TINY, padded, scrambled, tiny, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders import image as image_tower
from trainers.encoders.image import scaling
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.text import build_encoder
from trainers.encoders.towers import build_towers, export_towers, load_towers, prepare_towers
from trainers.export import export_sentence_transformer, load_exported
from trainers.tower_config import ImageConfig, ImageFromConfig

SIZES = {"image_size": 16, "patch_size": 8, "hidden": 24, "layers": 2, "heads": 2, "intermediate": 40}


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Blocks of random colours: resizing and cropping show."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def png(image: Image.Image) -> Media:
    out = io.BytesIO()
    image.save(out, "PNG")
    return Media("image", out.getvalue())


PICTURES = [picture(i, *shape) for i, shape in enumerate([(16, 16), (30, 20), (9, 50), (16, 40), (33, 16)])]


def dual(folder, image: ImageConfig | None = None, **keys):
    """(recipe's section, towers, what makes their inputs)"""
    image = image or ImageConfig(config=ImageFromConfig(**SIZES))
    config = ModelConfig(config=TINY, image=image, max_tokens=40, **keys)
    prepare_model_folder(config, folder, train_tokenizer)
    prepare_towers(config, folder)
    torch.manual_seed(0)
    towers = build_towers(config, folder).eval()
    return config, scrambled(towers), reader(folder, towers)


def reader(folder, towers):
    text = FolderTokenizer(folder, towers.text.spec.max_tokens, towers.text.spec.prompts)
    return Routed({"text": text, "image": ImageFront.of(folder / "image", towers.image.spec.max_tokens)}, "kind")


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        (SiglipImageProcessorPil, {"size": {"height": 16, "width": 24}}),
        (CLIPImageProcessorPil, {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    ],
)
def test_an_image_is_prepared_as_transformers_prepares_it(processor, settings, tmp_path):
    theirs = processor(**settings)
    theirs.save_pretrained(tmp_path)
    front = ImageFront.of(tmp_path, 4)
    inputs = front([png(image) for image in PICTURES], "document")
    assert inputs.lengths.tolist() == [4] * len(PICTURES)
    pixels = torch.from_numpy(inputs.arrays["pixels"].values)
    wanted = theirs(PICTURES, return_tensors="pt")["pixel_values"]
    scale, shift = scaling(theirs.to_dict())
    torch.testing.assert_close(pixels * scale + shift, wanted, rtol=0, atol=1e-5)


def test_what_a_processor_does_beyond_resizing_and_cropping_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3, "longest_edge": 9}}')
    with pytest.raises(UsageError, match="resizes to a height and width"):
        ImageFront.of(tmp_path, 4)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 8}, "crop_size": 16, "do_center_crop": true}'
    )
    with pytest.raises(UsageError, match="which is smaller"):
        ImageFront.of(tmp_path, 4)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_image_tower_of_a_pretrained_model_gives_its_own_features(family, tmp_path):
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    vision, text = sizes | {"image_size": 16, "patch_size": 8}, sizes | {"vocab_size": 60}
    torch.manual_seed(0)
    if family == "clip":
        whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    else:
        whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    whole.eval().save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    config = ModelConfig(config=TINY, image=ImageConfig(path=str(tmp_path / "clip")), max_tokens=40)
    prepare_model_folder(config, tmp_path / "m", train_tokenizer)
    prepare_towers(config, tmp_path / "m")
    towers = build_towers(config, tmp_path / "m").eval()
    found = LocalEncoder(towers, reader(tmp_path / "m", towers)).encode([png(p) for p in PICTURES], "document")
    with torch.inference_mode():
        features = whole.get_image_features(**processor(PICTURES, return_tensors="pt"))
    features = getattr(features, "pooler_output", features)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(features, dim=-1), atol=1e-5)


def test_a_whole_clip_gives_its_own_features(tmp_path):
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    train_tokenizer(400, tmp_path / "clip")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A <|endoftext|>",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("<|endoftext|>", tokenizer.eos_token_id)],
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text = sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 40}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for part in (whole, processor, tokenizer):
        part.save_pretrained(tmp_path / "clip")
    path = str(tmp_path / "clip")
    config = ModelConfig(path=path, image=ImageConfig(path=path), bidirectional=False)
    prepare_model_folder(config, tmp_path / "m")
    prepare_towers(config, tmp_path / "m")
    towers = build_towers(config, tmp_path / "m").eval()
    encoder = LocalEncoder(towers, reader(tmp_path / "m", towers))
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.inference_mode():
        found = whole(**tokens, **processor(PICTURES, return_tensors="pt"))
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), found.text_embeds, atol=1e-5)
    np.testing.assert_allclose(encoder.encode([png(p) for p in PICTURES], "document"), found.image_embeds, atol=1e-5)


def test_the_text_part_of_a_siglip_reads_its_padding_too(tmp_path):
    import transformers

    train_tokenizer(400, tmp_path / "siglip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "siglip")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config=sizes | {"patch_size": 8})
    whole = transformers.SiglipModel(config).eval()
    scrambled(whole.text_model)
    whole.save_pretrained(tmp_path / "siglip")
    model = ModelConfig(path=str(tmp_path / "siglip"))
    spec = prepare_model_folder(model, tmp_path / "m")
    encoder = build_encoder(model, tmp_path / "m")
    read = FolderTokenizer(tmp_path / "m", spec.max_tokens, spec.prompts)
    found = LocalEncoder(encoder, read, 30).encode(TEXTS, "query")
    filled = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt").input_ids
    with torch.inference_mode():
        wanted = whole.get_text_features(input_ids=filled)
    wanted = getattr(wanted, "pooler_output", wanted)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5)
    out = export_sentence_transformer(encoder.state_dict(), spec, tmp_path / "m", tmp_path / "out", model)
    back = LocalEncoder(load_exported(out), read).encode(TEXTS, "query")
    np.testing.assert_allclose(back, found, atol=1e-5)
    assert "exported_encoder" in (out / "README.md").read_text()
    with pytest.raises(UsageError, match="pools by itself"):
        prepare_model_folder(model.model_copy(update={"pooling": "mean"}), tmp_path / "other")


def test_a_siglip_text_tower_of_random_weights_trains_every_weight(tmp_path):
    tower = TINY.model_copy(update={"architecture": "siglip_text_model", "dropout": 0.0})
    encoder, spec = tiny(tmp_path / "m", tower, max_tokens=12)
    assert (spec.filler is not None, spec.own_pooling) == (True, True)
    encoder.train()(TowerInputs(*padded([3, 9]))).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_processor_of_another_size_than_the_model_reads_is_one_sentence(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    with pytest.raises(UsageError, match=r"brings images to 32 x 32 pixels, which the model doesn't read"):
        dual(tmp_path / "m", ImageConfig(path=str(tmp_path / "vision")))


def test_weights_that_reach_no_vector_are_left_alone_and_patterns_freeze(tmp_path):
    clip = ImageFromConfig(architecture="clip_vision_model", **SIZES)
    _, towers, _ = dual(tmp_path / "a", ImageConfig(config=clip, pooling="mean"))
    names = {name for name, p in towers.image.named_parameters() if not p.requires_grad}
    assert names == {"backbone.post_layernorm.weight", "backbone.post_layernorm.bias"}
    _, towers, _ = dual(tmp_path / "b", ImageConfig(config=clip, freeze=["backbone.*"]))
    assert [n for n, p in towers.image.named_parameters() if p.requires_grad] == ["readout.head.0.weight"]
    with pytest.raises(UsageError, match=r"model.image.freeze: no.such matches no weight"):
        dual(tmp_path / "c", ImageConfig(config=clip, freeze=["no.such"]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    place = tmp_path_factory.mktemp("image")
    config, towers, inputs = dual(place / "m", query_prompt="find: ", head={"sizes": [20]})
    return towers, inputs, export_towers(towers.state_dict(), place / "m", place / "out", config)


def test_sentence_transformers_encodes_texts_and_images_as_the_trainer_does(exported):
    from sentence_transformers import SentenceTransformer

    towers, inputs, out = exported
    theirs, ours = SentenceTransformer(str(out), device="cpu"), LocalEncoder(towers, inputs)
    images = ours.encode([png(p) for p in PICTURES], "document")
    assert images.shape == (len(PICTURES), 20)
    assert np.abs(images @ images.T - np.eye(len(PICTURES)))[~np.eye(len(PICTURES), dtype=bool)].min() < 0.999
    np.testing.assert_allclose(theirs.encode(PICTURES), images, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(PICTURES), images, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), ours.encode(TEXTS, "query"), atol=1e-5)
    mixed = ours.encode([TEXTS[0], png(PICTURES[1]), TEXTS[1]], "document")
    np.testing.assert_allclose(mixed[1], images[1], atol=1e-5)
    np.testing.assert_allclose(mixed[[0, 2]], ours.encode(TEXTS[:2], "document"), atol=1e-5)


def test_an_export_comes_back_with_every_weight_and_each_tower_loads_by_itself(exported):
    towers, _, out = exported
    back = load_towers(out)
    for name, weight in towers.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    alone = image_tower.load(out / "image")
    assert torch.equal(alone.readout.head[0].weight, towers.image.readout.head[0].weight)


def test_a_text_for_the_images_or_a_damaged_image_is_said_in_one_sentence(exported):
    _, inputs, _ = exported
    with pytest.raises(Undecodable, match=r"damaged|no image"):
        inputs([Media("image", png(PICTURES[0]).data[:60])], "document")
    with pytest.raises(Undecodable, match="no tower for audio"):
        inputs([Media("audio", b"RIFF")], "document")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"towers": "separate"}, "an item's kind says its tower"),
        ({"head": {"sizes": [8], "use": "training"}}, "the others have no such head"),
        ({"layers": [1, -1]}, "the other towers have one vector"),
    ],
)
def test_what_a_text_tower_alone_can_do_is_refused_beside_one_for_images(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(config=TINY, image=ImageConfig(config=ImageFromConfig(**SIZES)), **keys)
