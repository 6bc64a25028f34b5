# One image for the backend and every worker; docker-compose.yml says which is which.
#
#   docker build -t hardfirst .                                  CUDA: torch's ordinary build, about 7 GB
#   docker build -t hardfirst --build-arg ACCELERATOR=cpu \
#       --build-arg PIP_EXTRA_INDEX_URL=<address of torch's CPU builds, from its install page> .
#
# Not built in this project's CI, which has no Docker engine: its tests read these files and run the same commands.
FROM python:3.11-slim

ARG ACCELERATOR=cuda
ARG PIP_EXTRA_INDEX_URL=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY requirements.lock ./
# --no-deps: the lock is the whole list. Without CUDA its nvidia-* and triton packages are dead weight.
RUN if [ "$ACCELERATOR" = cpu ]; then grep -v -E "^(nvidia-|cuda-|triton)" requirements.lock > image.lock; \
    else cp requirements.lock image.lock; fi \
    && PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" pip install --no-deps -r image.lock

COPY pyproject.toml README.md LICENSE ./
COPY strategies strategies
COPY worker worker
COPY backend backend
COPY demo demo
# --no-build-isolation: setuptools is in the lock
RUN pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 1000 hardfirst && mkdir /data && chown hardfirst:hardfirst /data
USER hardfirst
ENV HARDFIRST_DATA_DIR=/data HARDFIRST_HOST=0.0.0.0
VOLUME /data
EXPOSE 9090
HEALTHCHECK --interval=15s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9090/health', timeout=2)"]
CMD ["hardfirst", "web"]
