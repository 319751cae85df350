# mvlm with CUDA: training, data, search and the page. A GPU is given with `docker run --gpus all`.
#   docker build -t mvlm .
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" mvlm mvlm doctor
# torch's wheels bring CUDA's libraries, so the image needs no CUDA of its own. Triton needs a C compiler to launch kernels.
FROM python:3.12-slim-bookworm

# Any compiler of Debian will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 mvlm && install --directory --owner mvlm /work /opt/mvlm
ENV PATH=/opt/mvlm/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
# The packages come first, because they change less often than the code. pyproject.toml has their versions. What the build
# leaves is removed: setuptools would take the empty module in it for newer than the real one.
WORKDIR /home/mvlm/source
COPY --chown=mvlm pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN mkdir -p kernels dataloading benchmarks mvlm && touch mvlm/__init__.py \
    && python -m venv /opt/mvlm \
    && pip install --no-cache-dir --disable-pip-version-check '.[data,train,search,export,app]' \
    && rm -rf build ./*.egg-info mvlm
COPY --chown=mvlm mvlm mvlm
COPY --chown=mvlm kernels kernels
COPY --chown=mvlm dataloading dataloading
COPY --chown=mvlm benchmarks benchmarks
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall .
WORKDIR /work
CMD ["mvlm", "--help"]
