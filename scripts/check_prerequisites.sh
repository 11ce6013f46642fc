#!/bin/sh
# Checks for what the build needs but cannot install, and prints what is missing with the command that installs it.
# Usage: check_prerequisites.sh PYTHON CXX
python=$1
cxx=$2
packages=

missing() { # message, Debian package
    echo "missing: $1" >&2
    packages="$packages $2"
}

if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    missing "Python ('$python' does not run)" "python3 python3-venv python3-dev"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "missing: Python 3.10 or newer ('$python' is $version)." >&2
    echo "Debian 12, Ubuntu 22.04 and newer have one as python3; choose a different one with: make PYTHON=python3.12" >&2
    exit 1
else
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        missing "the venv module of $python" "python$version-venv"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing "Python.h of $python, which the C++ modules include" "python$version-dev"
fi
echo '#include <thread>' | $cxx -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
    missing "a C++17 compiler ('$cxx' does not compile)" "g++"

if [ -n "$packages" ]; then
    echo "On Debian or Ubuntu, install with: apt-get install$packages" >&2
    exit 1
fi
