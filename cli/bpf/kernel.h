/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The kernel as the programs see it: helpers, and the registers at a kprobe.
 *
 * Compiling this only needs headers of user space, and running it needs no headers.
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
#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)
#define offsetof(type, member) __builtin_offsetof(type, member)

/* Keep the compiler from moving memory accesses across this. x86 and the JIT keep the order of writes and of reads. */
#define barrier() asm volatile("" ::: "memory")
/* Hide the value of a number from the compiler, so that the verifier sees the comparison before the use. */
#define forget(number) asm volatile("" : "+r"(number))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) =
	(void *)BPF_FUNC_map_update_elem;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static long (*const bpf_map_push_elem)(void *map, const void *value, u64 flags) = (void *)BPF_FUNC_map_push_elem;
static long (*const bpf_map_pop_elem)(void *map, void *value) = (void *)BPF_FUNC_map_pop_elem;
static long (*const bpf_loop)(u32 times, void *body, void *context, u64 flags) = (void *)BPF_FUNC_loop;
static u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static u64 (*const bpf_get_smp_processor_id)(void) = (void *)BPF_FUNC_get_smp_processor_id;
static u64 (*const bpf_get_current_task)(void) = (void *)BPF_FUNC_get_current_task;
static long (*const bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

#define KNOWN_FIRST 0x45580000
enum known {
#define KNOWN(name) KNOWN_##name,
#include "known.h"
#undef KNOWN
};

/* Return a value that known.h names. The verifier removes branches that are false on this kernel. */
#define known(name)                                                                                                    \
	({                                                                                                             \
		u64 known_;                                                                                            \
		asm volatile("%0 = %1" : "=r"(known_) : "i"(KNOWN_FIRST + KNOWN_##name));                                       \
		known_;                                                                                                \
	})
/* Value for a field that this kernel does not have. */
#define ABSENT (~0ULL)

/* Apply a mask that known.h names to a number. */
#define mask_by(number, name) asm volatile("%0 &= %1" : "+r"(number) : "i"(KNOWN_FIRST + KNOWN_##name))

/* Return the address of the value of an array with one entry. The loader puts it in place of the array. */
static __always_inline char *value_of(void *map)
{
	asm volatile("" : "+r"(map));
	return map;
}

/* Return the first argument of a tracepoint. It is read before anything else happens. */
static __always_inline u64 first_of(const struct bpf_raw_tracepoint_args *args)
{
	u64 first = args->args[0];

	asm volatile("" : "+r"(first));
	return first;
}

/*
 * Registers at a kprobe of x86-64 (struct pt_regs in arch/x86/include/asm/ptrace.h), as user space's header has them.
 */
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	unsigned long orig_rax, rip, cs, eflags, rsp, ss;
};

/*
 * Define a program at the entry of a function of KVM, whose first argument is @vcpu. There are two versions, of which the
 * loader attaches one: fentry costs less, but needs more privileges.
 */
#define AT_FUNCTION(function, name)                                                                                    \
	static __always_inline int name(u64 vcpu);                                                                     \
	SEC("fentry/" #function) int name##_by_fentry(u64 *arguments)                                                  \
	{                                                                                                              \
		return name(arguments[0]);                                                                             \
	}                                                                                                              \
	SEC("kprobe/" #function) int name##_by_kprobe(struct pt_regs *registers)                                       \
	{                                                                                                              \
		return name(registers->rdi);                                                                           \
	}                                                                                                              \
	static __always_inline int name(u64 vcpu)

/* bpf_rdonly_cast(). The loader turns it into a call of the kernel's function. */
static void *(*const rdonly_cast)(u64 address, u64 type) = (void *)0x45590000;

/*
 * Read a number of the kernel, or 0 if it cannot be read.
 *
 * bpf_rdonly_cast() only sets a type for the verifier, and costs no instruction. A bad address gives 0 as well, by an
 * exception.
 */
#define read_by(can_cast, type, address)                                                                               \
	({                                                                                                             \
		type number_;                                                                                          \
		if (can_cast) {                                                                                        \
			number_ = *(volatile type *)rdonly_cast(address, known(number_type));                          \
		} else {                                                                                               \
			type read_ = 0;                                                                                \
			bpf_probe_read_kernel(&read_, sizeof(read_), (const void *)(address));                         \
			number_ = read_;                                                                               \
		}                                                                                                      \
		number_;                                                                                               \
	})
#define read_kernel(type, address) read_by(known(can_cast), type, address)

#endif
