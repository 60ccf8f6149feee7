# rfengine serve in a container: the page, realtime sessions and video jobs on port 8000.
#
# Build, for a CPU or for an NVIDIA GPU. UID is the user that runs in it; with yours it can read your key file.
#
#   docker build --build-arg UID=$(id -u) -t rfengine .
#   docker build --build-arg UID=$(id -u) --build-arg DEVICE=cuda -t rfengine:cuda .
#
# With TORCH_INDEX, an index of torch's CPU builds (pytorch.org names it), the CPU's image is some gigabytes smaller.
#
# Make an access key, which the server asks for (any name, the key as password), and start it:
#
#   (umask 077 && openssl rand -hex 32 > keys)
#   docker run --rm --name rfengine -p 8000:8000 -v rfengine-data:/data \
#       --mount type=bind,source="$PWD/keys",target=/run/secrets/rfengine_api_keys,readonly rfengine
#
# With a GPU add `--gpus all` and take rfengine:cuda. Options of `rfengine serve` come last, such as
# `--model /models/reward-forcing` with `-v /path/to/it:/models/reward-forcing:ro`. `docker stop -t 30 rfengine`
# leaves sessions the time to end.

ARG DEVICE=cpu

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY constraints.txt /tmp/

FROM base AS torch-cpu
ARG TORCH_INDEX=
RUN pip install -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

# torch's default build brings CUDA and Triton, which needs a C compiler when a kernel first runs
FROM base AS torch-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install -c /tmp/constraints.txt torch

FROM torch-${DEVICE}
COPY . /tmp/rfengine
RUN RFENGINE_NATIVE=0 pip install -c /tmp/constraints.txt "/tmp/rfengine[serve]" && rm -rf /tmp/rfengine
ARG UID=1000
RUN useradd --uid "$UID" --create-home rfengine && install --directory --owner=rfengine --mode=700 /data
USER rfengine
WORKDIR /home/rfengine
VOLUME /data
EXPOSE 8000
# the port answers once the model is loaded, which takes minutes with a large one
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m CMD \
    ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["rfengine", "serve", "--host", "0.0.0.0", "--data-directory", "/data", \
    "--api-key-file", "/run/secrets/rfengine_api_keys"]
