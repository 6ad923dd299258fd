# moce in a container, for CPUs or NVIDIA GPUs:
#
#   docker build --tag moce .
#   docker build --tag moce:cuda --build-arg DEVICE=cuda .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" moce:cuda pretrain photos/ --out runs/mae
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# cpu or cuda. The wheels of PyTorch from PyPI bring CUDA with them, those of its CPU index do not.
ARG DEVICE=cpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
RUN set -eu; \
    case "$DEVICE" in \
      cpu) pip install --no-cache-dir --index-url "$CPU_INDEX" torch torchvision ;; \
      cuda) pip install --no-cache-dir torch torchvision ;; \
      *) echo "DEVICE must be cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac; \
    pip install --no-cache-dir /wheels/*.whl; \
    moce doctor
WORKDIR /work
ENTRYPOINT ["moce"]
CMD ["--help"]
