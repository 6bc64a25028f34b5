#!/bin/sh
# Run once by the PostgreSQL image, on an empty data folder: a database and an owner for each of the two.
set -eu
for name in labelstudio hardfirst; do
  psql -v ON_ERROR_STOP=1 -v name="$name" -v password="$POSTGRES_PASSWORD" --username postgres <<'SQL'
CREATE USER :"name" PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
