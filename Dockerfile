# The server: gRPC, libvips and ONNX Runtime; no compiler, no pip, no root. The default target, the last one, is for CPUs
# and holds no torch; --target gpu adds PyTorch and Triton for NVIDIA's container runtime.
FROM python:3.12-slim AS source
WORKDIR /src
RUN python -m venv /opt/fullframe
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY kernels kernels

FROM source AS build-cpu
# What the server never loads stays behind: installers, ONNX Runtime's C library (Python has its own) and tools, tests.
RUN /opt/fullframe/bin/pip install --no-cache-dir --no-compile -c constraints.txt . \
    && cd /opt/fullframe/lib/python3*/site-packages \
    && rm -rf pip pip-* setuptools setuptools-* pkg_resources _distutils_hack distutils-precedence.pth \
        onnx/backend/test onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/capi/libonnxruntime.so.* \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && find . -name '*.pyi' -delete \
    && rm -f /opt/fullframe/bin/pip*

FROM source AS build-gpu
RUN /opt/fullframe/bin/pip install --no-cache-dir --no-compile -c constraints.txt '.[gpu]'

FROM python:3.12-slim AS base
# Nothing but temporary files is written at run time; where there is no folder for them, uploads are held in memory.
ENV PATH=/opt/fullframe/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 FULLFRAME_HOST=0.0.0.0
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["fullframe", "probe"]
ENTRYPOINT ["fullframe"]
CMD ["serve"]

FROM base AS gpu
# Triton compiles a kernel when it first runs, and its launcher with a C compiler; both stay in the temporary folder.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /opt/fullframe /opt/fullframe
# It imports PyTorch, compiles all kernels and runs the likely shapes before it is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m CMD ["fullframe", "probe"]
ENV TRITON_CACHE_DIR=/tmp/triton NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM base AS cpu
COPY --from=build-cpu /opt/fullframe /opt/fullframe
USER 10001:10001
