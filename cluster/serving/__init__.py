"""`gyre serve`: a model behind OpenAI's embeddings protocol.

`protocol` is what a request and a response look like, `endpoint` answers HTTP, `batching` brings requests together,
`model` holds the encoder and follows its alias, `deployment` places them with Ray Serve.
"""
