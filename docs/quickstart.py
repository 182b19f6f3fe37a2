# %% [markdown]
# For everybody who uses the library from Python: text to vectors, vectors to text, and the text that follows.
# Run the file as it is, or cell by cell where the editor knows `# %%`. No network, no GPU.

# %%
import lvm

text = """The steam engine was first used to pump water out of mines. James Watt added a separate
condenser in 1765. His engines needed a quarter of the coal that older ones burned."""

# %% Text to vectors, and back
codec = lvm.load_codec("mini")
chunks = lvm.chunk(text, codec)  # at most 32 tokens each, short enough to decode
vectors = codec.encode(chunks)  # (N, 768) float32, norm 1
print(codec.decode(vectors, steps=1).texts)

# %% The text that follows
generator = lvm.Generator(codec, lvm.load_predictor("gru"))
for prediction in generator.generate([text], length=2)[0]:
    print(f"{prediction.source} {prediction.cosine:.2f} {prediction.text}")
