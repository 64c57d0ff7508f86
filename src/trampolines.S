/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Trampolines from the call that ftrace puts at the head of a function to the
 * callbacks in src/hooks, for the functions that KVM calls most.
 *
 * ftrace's own trampoline saves all registers that may hold an argument, and 120
 * bytes more.  Each trampoline here saves only the arguments that its function
 * has, as BPF's trampolines do (arch_prepare_bpf_trampoline()).  gcc assumes
 * that a call for profiling changes all registers that a callee need not save
 * (-pg turns off -fipa-ra).
 *
 * ftrace calls a trampoline while the function has no other user.  Otherwise it
 * calls the ops' func in src/hooks, which does the same.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>

#include <asm/frame.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>

#include "layout.h"

	.text

/* void kvm_arch_vcpu_load(struct kvm_vcpu *vcpu, int cpu) */
SYM_FUNC_START(exitmeter_trampoline_load)
	ANNOTATE_NOENDBR	/* ftrace calls it directly. */
	CALL_DEPTH_ACCOUNT
	FRAME_BEGIN
	pushq	%rdi
	pushq	%rsi
	call	exitmeter_load
	popq	%rsi
	popq	%rdi
	FRAME_END
	RET
SYM_FUNC_END(exitmeter_trampoline_load)

/* void kvm_arch_vcpu_put(struct kvm_vcpu *vcpu) */
SYM_FUNC_START(exitmeter_trampoline_put)
	ANNOTATE_NOENDBR
	CALL_DEPTH_ACCOUNT
	FRAME_BEGIN
	pushq	%rdi
	call	exitmeter_put
	popq	%rdi
	FRAME_END
	RET
SYM_FUNC_END(exitmeter_trampoline_put)

/* int kvm_emulate_cpuid(struct kvm_vcpu *vcpu) */
SYM_FUNC_START(exitmeter_trampoline_cpuid)
	ANNOTATE_NOENDBR
	CALL_DEPTH_ACCOUNT
	/* The test of Leaves::may_answer() in meter/leaves.rs. */
	movl	LAYOUT_VCPU_REGS(%rdi), %eax
	shrl	$4, %eax
	cmpl	$0x4ffffff, %eax
	je	1f
	RET

1:	FRAME_BEGIN
	pushq	%rdi
	/* The return address of kvm_emulate_cpuid(), in its caller. */
	movq	2 * 8 + FRAME_OFFSET(%rsp), %rsi
	call	exitmeter_is_query
	popq	%rdi
	FRAME_END
	testb	%al, %al
	jne	2f
	RET

	/*
	 * Go on in our function in place of KVM's, which has done nothing yet.
	 * Drop the return address into KVM's function.  The next one on the
	 * stack is the one into its caller.
	 */
2:	addq	$8, %rsp
	UNWIND_HINT_FUNC
	jmp	exitmeter_emulate_cpuid
SYM_FUNC_END(exitmeter_trampoline_cpuid)
