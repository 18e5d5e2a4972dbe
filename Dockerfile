# lvssl for CPUs and NVIDIA GPUs; what it holds is decided by tools/install.sh, as anywhere else.
#
#     docker build -t lvssl .
#     docker run --rm --gpus all -v "$PWD:/work" lvssl pretrain --data photos/ --out run
#
# torch's wheel brings CUDA's libraries along, the host lends its driver: one image for both kinds of machine.
# For CPUs alone, some GB smaller: --build-arg PIP_INDEX_URL=, an index that has torch's CPU wheels.
ARG BASE=debian:bookworm-slim
FROM $BASE
ARG EXTRAS=export,faiss
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY . /opt/lvssl
# Triton and torch.compile compile where they run: g++ and Python's headers.
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates g++ python3-dev && \
    EXTRAS=$EXTRAS PIP_NO_CACHE_DIR=1 /opt/lvssl/tools/install.sh && \
    rm -rf /opt/lvssl/.cache /var/lib/apt/lists/*
ENV PATH=/opt/lvssl/.venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["lvssl"]
