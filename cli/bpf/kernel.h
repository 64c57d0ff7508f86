/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The kernel as the programs see it: helpers, and the registers at a kprobe.
 *
 * Nothing but headers of user space is needed to compile this, and none to run it.
 */
#ifndef EXITMETER_BPF_KERNEL_H
#define EXITMETER_BPF_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>

typedef __u8 u8;
typedef __u32 u32;
typedef __u64 u64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define unlikely(condition) __builtin_expect(!!(condition), 0)
#define offsetof(type, member) __builtin_offsetof(type, member)

/* The compiler leaves reads and writes where they are; x86 and the JIT keep the order of writes, and that of reads. */
#define barrier() asm volatile("" ::: "memory")
/* The compiler forgets what it knows of a number, so that the verifier sees the comparison before its use. */
#define forget(number) asm volatile("" : "+r"(number))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) =
	(void *)BPF_FUNC_map_update_elem;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static long (*const bpf_map_push_elem)(void *map, const void *value, u64 flags) = (void *)BPF_FUNC_map_push_elem;
static long (*const bpf_map_pop_elem)(void *map, void *value) = (void *)BPF_FUNC_map_pop_elem;
static long (*const bpf_loop)(u32 times, void *body, void *context, u64 flags) = (void *)BPF_FUNC_loop;
static u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static u32 (*const bpf_get_smp_processor_id)(void) = (void *)BPF_FUNC_get_smp_processor_id;
static u64 (*const bpf_get_current_task)(void) = (void *)BPF_FUNC_get_current_task;
static long (*const bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

/* The registers at a kprobe of x86-64 (struct pt_regs, arch/x86/include/asm/ptrace.h): user space's header has them. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	unsigned long orig_rax, rip, cs, eflags, rsp, ss;
};

/* The first argument of the function that a kprobe is on. */
static __always_inline u64 first_argument(const struct pt_regs *registers)
{
	return registers->rdi;
}

/* Read a number of the kernel's; 0 where it cannot be read. */
#define read_kernel(type, address)                                                                                     \
	({                                                                                                             \
		type number_ = 0;                                                                                      \
		bpf_probe_read_kernel(&number_, sizeof(number_), (const void *)(address));                             \
		number_;                                                                                               \
	})

#endif
