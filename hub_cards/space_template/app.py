"""The Space: a model and the app around it."""

from lladamedv.app import build_app
from lladamedv.demo import DEMO_MODEL, load_model


MODEL = "{{ model }}"
REVISION = "{{ revision }}" or None  # the newest

model, processor = load_model(DEMO_MODEL if MODEL == "demo" else MODEL, revision=REVISION)
demo = build_app(model, processor)

if __name__ == "__main__":
    demo.launch()
