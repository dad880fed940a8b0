# The server and the app in a container: docs/deployment.md says how to build and run it.
#
# TORCH_INDEX chooses the build of torch: an index with CPU builds, or empty for the CUDA build of the default index.
ARG PYTHON=3.12-slim

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=""
ARG EXTRAS="serve,app,medical-codecs"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
ENV PATH="/venv/bin:${PATH}"
WORKDIR /src
# torch on its own: the layer stays when only the sources change.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY . .
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[${EXTRAS}]"

FROM python:${PYTHON}
COPY --from=build /venv /venv
# Models from the Hub are kept in the volume. Gradio must not call home.
ENV PATH="/venv/bin:${PATH}" HF_HOME=/models PYTHONUNBUFFERED=1 GRADIO_ANALYTICS_ENABLED=False \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --user-group --create-home lladamedv && install --directory --owner=lladamedv /models
USER 1000:1000
WORKDIR /home/lladamedv
VOLUME /models
EXPOSE 8000 7860
# PORT and HEALTH are those of the server; compose.yaml has the app's.
ENV PORT=8000 HEALTH=health
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/{HEALTH}'.format(**os.environ), timeout=8)"]
ENTRYPOINT ["lladamedv"]
CMD ["serve", "--host", "0.0.0.0"]
