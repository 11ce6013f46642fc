// Marks a function that is compiled for host and device.
#pragma once

#ifdef __CUDACC__
#define PEFTK_HOST_DEVICE __host__ __device__
#else
#define PEFTK_HOST_DEVICE
#endif
