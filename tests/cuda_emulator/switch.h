// Switches from one stack to another without the system calls of swapcontext: pushes the registers that a called
// function must preserve, exchanges the stack pointer, and pops the other stack's registers.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_on_host {

extern "C" void cuda_on_host_switch(void** leave, void* enter);

#if defined(__x86_64__)
constexpr int kEntryWord = 6;
constexpr int kFirstWords = 8;  // entered as by a call: a null return address is above what is popped
asm(R"(
    .text
    .type cuda_on_host_switch, @function
cuda_on_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_on_host_switch, . - cuda_on_host_switch
)");
#elif defined(__aarch64__)
constexpr int kEntryWord = 11;  // x30, after x19 ... x29
constexpr int kFirstWords = 20;
asm(R"(
    .text
    .type cuda_on_host_switch, %function
cuda_on_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_on_host_switch, . - cuda_on_host_switch
)");
#else
#error "tests/cuda_emulator: expected x86-64 or aarch64"
#endif

// The stack pointer of a new stack whose first switch to it calls `entry`. `top` is a multiple of 16.
inline void* new_stack(char* top, void (*entry)()) {
    auto** words = reinterpret_cast<void**>(top) - kFirstWords;
    memset(words, 0, kFirstWords * sizeof(void*));
    words[kEntryWord] = reinterpret_cast<void*>(entry);
    return words;
}

}  // namespace cuda_on_host
