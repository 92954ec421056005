"""A vision–language model as a tower: what it is shown, that it is what transformers computes, and training it."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cluster.models import tokenizer_of
from data_services.assemble import GlobalBatch
from data_services.schema import Media, Undecodable
from data_services.vision_text import IMAGE_TOKEN, PLACEHOLDER, Patches
from tests.trainers.encoders.steps import assert_twins, make_step, share_of, take, twin_of
from tests.trainers.encoders.test_image import PICTURES, picture, png
from tests.trainers.encoders.tiny import TEXTS, TINY, scrambled, train_tokenizer
from trainers.config import AdapterConfig, ModelConfig, VisionConfig
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.text import build_encoder
from trainers.export import export_sentence_transformer, load_exported
from trainers.model import Trained
from trainers.tower_config import VisionFromConfig as Vision

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIDE, MERGE, MOST = 4, 2, 12
ITEMS = [
    TEXTS[0],
    png(PICTURES[0]),
    {"title": "a cat", "photo": png(PICTURES[1])},
    png(picture(9, 60, 90)),
    {"photo": png(PICTURES[2]), "title": TEXTS[1], "other": png(PICTURES[3])},
    TEXTS[3],
]


def config_of(family, **keys) -> ModelConfig:
    tower = TINY.model_copy(update={"architecture": family, "hidden": 64, "dropout": 0.0, "heads": 2})
    sizes = Vision(patch_size=SIDE, merge=MERGE, hidden=32, layers=2, heads=2, intermediate=64)
    vision = VisionConfig(config=sizes, max_image_tokens=MOST)
    return ModelConfig(config=tower, vision=vision, bidirectional=False, pooling="last", **({"max_tokens": 60} | keys))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family) / "m"
        prepare_model_folder(config_of(family), made[family], train_tokenizer)
    return made


def encoder_of(family, folder, **keys):
    torch.manual_seed(2)
    return scrambled(build_encoder(config_of(family, **keys), folder))


def test_patches_are_those_of_transformers_and_bounded():
    theirs = Qwen2VLImageProcessorPil(
        patch_size=SIDE, merge_size=MERGE, size={"shortest_edge": 64, "longest_edge": 64 * MOST}, do_normalize=False
    )
    ours = Patches(SIDE, MERGE, 64, 64 * MOST)
    for image in [*PICTURES, picture(9, 60, 90), picture(10, 3, 4)]:
        wanted = theirs(image, return_tensors="pt")
        patches, grid = ours(np.asarray(image))
        assert [1, *grid] == wanted["image_grid_thw"][0].tolist()
        assert grid[0] * grid[1] <= MOST * MERGE**2
        found = torch.from_numpy(patches).view(len(patches), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(patches), -1)
        torch.testing.assert_close(found / 255, wanted["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_is_what_transformers_makes_of_the_item_alone(family, folders):
    """With its own processor's patches, the placeholder repeated, and `mm_token_type_ids`."""
    folder = folders[family]
    encoder, read = encoder_of(family, folder).eval(), tokenizer_of(folder)
    ours = LocalEncoder(encoder, read, 200).encode(ITEMS, "document")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    for item, vector in zip(ITEMS, ours, strict=True):
        parts = item.values() if isinstance(item, dict) else [item]
        images = [part for part in parts if isinstance(part, Media)]
        text = "".join(PLACEHOLDER if isinstance(part, Media) else part for part in parts)
        more, sizes = {}, iter(())
        if images:
            from PIL import Image

            opened = [Image.open(__import__("io").BytesIO(image.data)).convert("RGB") for image in images]
            more = dict(processor(opened, return_tensors="pt"))
            sizes = iter((more["image_grid_thw"].prod(1) // MERGE**2).tolist())
        pieces = text.split(IMAGE_TOKEN)
        text = pieces[0] + "".join(IMAGE_TOKEN * next(sizes) + piece for piece in pieces[1:])
        ids = torch.from_numpy(read.text([text], "document")[0].astype(np.int64))[None]
        if images:
            more["mm_token_type_ids"] = (ids == encoder.backbone.config.image_token_id).int()
        with torch.inference_mode():
            state = encoder.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), **more).last_hidden_state
        wanted = torch.nn.functional.normalize(state[0, -1].float(), dim=0)
        np.testing.assert_allclose(vector, wanted, atol=2e-5)


def test_an_image_counts_as_many_tokens_as_it_takes_and_too_many_are_one_sentence(folders):
    read = tokenizer_of(folders["qwen2_vl"])
    found = read(ITEMS, "document")
    image = (found.values == read.image_id).sum()
    assert image * MERGE**2 == len(found.arrays["patches"].values)
    assert found.arrays["grids"].lengths.tolist() == [0, 1, 1, 1, 2, 0]
    many = {str(i): png(picture(i, 90, 90)) for i in range(9)}
    with pytest.raises(Undecodable, match=r"more tokens than model.max_tokens leaves|places for them"):
        read([many], "document")
    with pytest.raises(Undecodable, match="1 images, but 2 places"):
        read([{"title": PLACEHOLDER, "photo": png(PICTURES[0])}], "document")
    with pytest.raises(Undecodable, match="reads texts and images"):
        read([Media("audio", b"RIFF")], "document")


# a step


def global_batch(folder) -> GlobalBatch:
    """Texts that look for images and items of both: a worker may have chunks without an image."""
    read = tokenizer_of(folder)
    queries = [*TEXTS[:4], TEXTS[4]]
    documents = [png(PICTURES[0]), ITEMS[2], TEXTS[3], ITEMS[4], TEXTS[1]]
    b = len(queries)
    return GlobalBatch(
        step=0,
        queries=read(queries, "query"),
        documents=read(documents, "document"),
        owners=np.arange(b),
        relations=np.ones(b, np.int8),
        query_ids=np.arange(b),
        document_ids=10 + np.arange(b),
        rows=np.arange(b),
        prompt_tokens=np.zeros(2 * b, np.int64),
    )


LORA = AdapterConfig(rank=2, alpha=2, modules_to_save=["embed_tokens"])


def model_of(family, folder, lora):
    return Trained(encoder_of(family, folder, adapter=LORA if lora else None), {})


def first_gradients(family, folder, stage, cached, lora):
    """What a worker has of the step, and the names of the averages that it moved."""
    step = make_step(model_of(family, folder, lora), stage, cached)
    before = {name: average.clone() for name, average in step.memory.encoder.full_weights().items()}
    taken = take(step, share_of(global_batch(folder), 60))
    after = step.memory.encoder.full_weights()
    return taken, {name for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize(
    ("family", "world_size", "stage", "cached", "lora"),
    [
        ("qwen2_5_vl", 1, 0, True, False),
        ("qwen2_vl", 2, 2, False, True),
        ("qwen3_vl", 2, 3, True, False),
        ("qwen2_vl", 2, 3, False, False),
        pytest.param("qwen2_5_vl", 2, 2, True, False, marks=pytest.mark.proof),
        pytest.param("qwen3_vl", 2, 3, False, True, marks=pytest.mark.proof),
    ],
)
def test_a_step_has_the_gradients_of_the_dense_twin(gloo, folders, family, world_size, stage, cached, lora):
    folder = folders[family]
    answers = gloo(world_size, first_gradients, family, folder, stage, cached, lora)
    twin = twin_of(model_of(family, folder, lora), global_batch(folder))
    assert_twins([taken for taken, _ in answers], twin, rtol=1e-3, atol=2e-5)
    moved = answers[0][1]
    assert moved
    if lora:
        assert all("lora_" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize("lora", [False, True])
def test_an_export_encodes_as_the_trainer_does(folders, tmp_path, lora):
    config = config_of("qwen2_vl", adapter=LORA if lora else None)
    encoder, read = (
        encoder_of("qwen2_vl", folders["qwen2_vl"], adapter=config.adapter),
        tokenizer_of(folders["qwen2_vl"]),
    )
    vectors = LocalEncoder(encoder, read).encode(ITEMS, "document")  # before the updates are merged into its weights
    out = export_sentence_transformer(encoder.state_dict(), encoder.spec, folders["qwen2_vl"], tmp_path / "out", config)
    assert "exported_encoder" in (out / "README.md").read_text()
    back = LocalEncoder(load_exported(out), tokenizer_of(out)).encode(ITEMS, "document")
    np.testing.assert_allclose(back, vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"token_dropout": 0.1}, "an image's places can't be hidden"),
        ({"config": None, "path": "x"}, "vision.config and config go together"),
    ],
)
def test_what_does_not_go_beside_a_vision_part_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"config": TINY, "vision": VisionConfig(config=Vision())} | keys)
