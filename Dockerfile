# Thresher for machines with NVIDIA GPUs, from a checkout:
#   docker build --tag thresher .
#   docker run --rm --init --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/work" \
#       thresher harvest configs/harvest/gpt2-small.toml
# The host needs NVIDIA's driver and its Container Toolkit; CUDA itself comes with PyTorch's wheel. Several processes:
#   docker run ... --entrypoint torchrun thresher --nproc-per-node 8 -m thresher.harvest CONFIG.toml
FROM python:3.12-slim

# Triton builds the launchers of its kernels with the system's C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY harvest harvest
COPY train train
COPY evaluate evaluate
COPY thresher thresher
COPY configs configs
COPY models models
RUN pip install --no-cache-dir --constraint constraints.txt '.[adapters,explain,gguf,remote,spread]'

# Caches (models, compiled kernels) are in the home folder, which any user may write: `--user` keeps results yours.
RUN useradd --create-home --uid 1000 thresher && chmod 1777 /home/thresher
ENV HOME=/home/thresher
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["thresher"]
CMD ["--help"]
