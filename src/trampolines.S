/* SPDX-License-Identifier: GPL-2.0 */
/*
 * From the call that ftrace puts at the head of a function to the callbacks in
 * src/hooks, for the functions that KVM calls most.
 *
 * ftrace's own trampoline saves all registers that a function may have its
 * arguments in, and 120 bytes more.  Each of these saves the arguments that its
 * function has, and no others, as BPF's trampolines do
 * (arch_prepare_bpf_trampoline()): gcc knows that a call for profiling may
 * change all registers that a callee need not save (-pg turns off -fipa-ra).
 *
 * ftrace calls a trampoline while nobody else is at the function.  Beside other
 * users it calls the ops' func in src/hooks, which does the same.
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
	/* As Leaves::may_answer() in meter/leaves.rs. */
	movl	LAYOUT_VCPU_REGS(%rdi), %eax
	shrl	$4, %eax
	cmpl	$0x4ffffff, %eax
	je	1f
	RET

1:	FRAME_BEGIN
	pushq	%rdi
	/* Who has called kvm_emulate_cpuid(). */
	movq	2 * 8 + FRAME_OFFSET(%rsp), %rsi
	call	exitmeter_is_query
	popq	%rdi
	FRAME_END
	testb	%al, %al
	jne	2f
	RET

	/*
	 * Go on in our function in place of KVM's, which has not done a thing: on
	 * the stack is the address to return to in it, and then its caller's.
	 */
2:	addq	$8, %rsp
	UNWIND_HINT_FUNC
	jmp	exitmeter_emulate_cpuid
SYM_FUNC_END(exitmeter_trampoline_cpuid)
