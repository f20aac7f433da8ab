# The CPU server: gRPC, libvips and ONNX Runtime; no torch, no compiler, no pip, no root.
FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/fullframe
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY kernels kernels
# What the server never loads stays behind: installers, ONNX Runtime's C library (Python has its own) and tools, tests.
RUN /opt/fullframe/bin/pip install --no-cache-dir --no-compile -c constraints.txt . \
    && cd /opt/fullframe/lib/python3*/site-packages \
    && rm -rf pip pip-* setuptools setuptools-* pkg_resources _distutils_hack distutils-precedence.pth \
        onnx/backend/test onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/capi/libonnxruntime.so.* \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && find . -name '*.pyi' -delete \
    && rm -f /opt/fullframe/bin/pip*

FROM python:3.12-slim
COPY --from=build /opt/fullframe /opt/fullframe
# Nothing but temporary files is written at run time; where there is no folder for them, uploads are held in memory.
ENV PATH=/opt/fullframe/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 FULLFRAME_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["fullframe", "probe"]
ENTRYPOINT ["fullframe"]
CMD ["serve"]
