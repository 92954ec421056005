"""What an export's README says: how it is loaded, with what can't be said inside it."""

from __future__ import annotations

from trainers.encoders.spec import ModelSpec


def card_of(spec: ModelSpec, base: str) -> str:
    """Of one tower's folder. base: of an adapter alone, else empty."""
    rests = f"It is an adapter of {base}, which adapter_config.json names and must go on naming.\n" if base else ""
    trusted = ", trust_remote_code=True" if spec.trust_remote_code or spec.latent else ""
    use = _TOKENS if spec.pooling == "tokens" else _VECTORS
    if spec.reads == "vision":
        return f"""# An embedding model of texts and images trained with gyre

{_VISION}
{spec.architecture}, {spec.pooling} pooling, {spec.dim} dimensions, {spec.max_tokens} tokens.
{rests}"""
    if spec.filler is not None:
        return f"""# A text embedding model trained with gyre

{_FILLED}
{spec.architecture}, {spec.dim} dimensions; every text is filled up to {spec.max_tokens} tokens, which all count.
"""
    if not spec.in_sentence_transformers:
        call = "encode_tokens" if spec.pooling == "tokens" else "encode"
        lines = _GYRE.replace("KIND", spec.reads).replace("CALL", call)
        return f"# The {spec.reads} tower of an embedding model trained with gyre\n\n{lines}"
    if spec.reads == "image":
        return f"""# The image tower of an embedding model trained with gyre

{_IMAGES}
{spec.architecture}, {"its own" if spec.own_pooling else spec.pooling} pooling, {spec.dim} dimensions.
"""
    return f"""# A text embedding model trained with gyre

{use.replace("TRUSTED", trusted)}
{spec.architecture}, {"bidirectional" if spec.bidirectional else "causal"} attention, {spec.pooling} pooling,
{spec.dim} dimensions, {spec.max_tokens} tokens. Needs transformers 5.2 or later.
{rests}"""


_VECTORS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder"TRUSTED)
queries = model.encode(["how to read a file"], prompt_name="query")
documents = model.encode(["def read(path): ..."], prompt_name="document")
similarity = model.similarity(queries, documents)
```
"""
_IMAGES = """```python
from PIL import Image
from sentence_transformers import SentenceTransformer  # version 6 or later

model = SentenceTransformer("this folder")
vectors = model.encode([Image.open("cat.png").convert("RGB")])
```
"""
_GYRE = """With gyre, from the folder above, which has the other towers:

```python
from pathlib import Path

from cluster.models import exported_encoder
from data_services.schema import Media

model = exported_encoder(Path("the folder above"))
vectors = model.CALL([Media("KIND", Path("FILE").read_bytes())], "document")
```
"""
_FILLED = """With gyre:

```python
from pathlib import Path

from cluster.models import exported_encoder

model = exported_encoder(Path("this folder"))
queries = model.encode(["a cat on a chair"], "query")
```
"""
_VISION = """With gyre:

```python
from pathlib import Path

from cluster.models import exported_encoder
from data_services.schema import Media

model = exported_encoder(Path("this folder"))
texts = model.encode(["a cat on a chair"], "query")
images = model.encode([Media("image", Path("cat.png").read_bytes())], "document")
```

It is also a folder of transformers: config, weights, tokenizer and image processor; the vector is the normalised state
of the pooled token.
"""
_TOKENS = """A vector for each token; two texts are compared by the sum over query tokens of the nearest document token.

```python
from sentence_transformers import MultiVectorEncoder  # version 6.2 or later

model = MultiVectorEncoder("this folder"TRUSTED)
queries = model.encode_query(["how to read a file"])
documents = model.encode_document(["def read(path): ..."])
similarity = model.similarity(queries, documents)
```

With gyre itself:

```python
from pathlib import Path

from data_services.tokenizer import FolderTokenizer
from trainers.encoders.local import LocalEncoder
from trainers.export import load_exported

folder = Path("this folder")
encoder = load_exported(folder)
tokenizer = FolderTokenizer(folder, encoder.spec.max_tokens, encoder.spec.prompts)
queries = LocalEncoder(encoder, tokenizer).encode_tokens(["how to read a file"], "query")
```
"""
