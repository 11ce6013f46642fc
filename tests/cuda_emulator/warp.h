// Warp instructions. Masks are checked: every lane in a mask must arrive at the same line.
#pragma once

#include <cstring>

#include "executor.h"

namespace cuda_on_host {

// Values of up to 8 bytes are passed as bits.
template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a value of up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned segment(int width) { return lane() & ~(unsigned(width) - 1); }

}  // namespace cuda_on_host

inline void __syncthreads(cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    cuda_on_host::barrier(site);
}

inline void __syncwarp(unsigned mask = ~0u, cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    cuda_on_host::sync_warp(site, mask);
}

// Lanes whose source is outside their segment of `width` lanes get their own value, as in the PTX manual's shfl.sync.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    using namespace cuda_on_host;
    const unsigned from = segment(width) | (unsigned(source) & unsigned(width - 1));
    return from_bits<T>(shuffle("__shfl_sync", site, mask, to_bits(value), from));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    using namespace cuda_on_host;
    const unsigned from = lane() < segment(width) + delta ? lane() : lane() - delta;
    return from_bits<T>(shuffle("__shfl_up_sync", site, mask, to_bits(value), from));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    using namespace cuda_on_host;
    const unsigned from = lane() + delta >= segment(width) + unsigned(width) ? lane() : lane() + delta;
    return from_bits<T>(shuffle("__shfl_down_sync", site, mask, to_bits(value), from));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32,
                  cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    using namespace cuda_on_host;
    const unsigned partner = (lane() ^ unsigned(other)) % 32;
    const unsigned from = partner >= segment(width) + unsigned(width) ? lane() : partner;
    return from_bits<T>(shuffle("__shfl_xor_sync", site, mask, to_bits(value), from));
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    return cuda_on_host::ballot("__ballot_sync", site, mask, predicate);
}

inline int __any_sync(unsigned mask, int predicate, cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    return cuda_on_host::ballot("__any_sync", site, mask, predicate) != 0;
}

inline int __all_sync(unsigned mask, int predicate, cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    return cuda_on_host::ballot("__all_sync", site, mask, predicate) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, cuda_on_host::Site site = {__builtin_FILE(), __builtin_LINE()}) {
    return cuda_on_host::match(site, mask, cuda_on_host::to_bits(value));
}
