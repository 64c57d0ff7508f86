# SPDX-License-Identifier: GPL-2.0
# The tiny guests. Each is a loop around one instruction that exits, assembled twice: for real mode
# (.code16, operands and addresses of 32 bits by prefix) and for 64-bit mode.
#
# At the start the VMM has set:
#   edi  how often to loop, at least 1
#   esi  an address for guests that touch memory
# All jumps are relative, so the code runs at any address. A guest ends with an OUT to port 0xf4.
# The VMM stops there and never returns from it.

# Label of a guest, for code.rs.
.macro guest name, mode
.global tiny_\name\()_\mode
tiny_\name\()_\mode:
.endm

# Loop to the guest's label 1, or end the guest.
.macro again
        dec     edi
        jnz     1b
        mov     dx, 0xf4
        out     dx, al
        ud2
.endm

# `mode` is 16 or 64; `a` and `s` are the widest RAX and RSI in it, `iret` its IRET.
.macro guests mode, a, s, iret
guest cpuid \mode
1:      xor     eax, eax
        xor     ecx, ecx
        cpuid
        again

guest out_user \mode
        mov     dx, 0x3f0
1:      out     dx, al
        again

guest in_user \mode
        mov     dx, 0x3f0
1:      in      al, dx
        again

# Read the speaker's port, which KVM's own PIT answers.
guest in_kernel \mode
1:      in      al, 0x61
        again

# Write to a port that is an ioeventfd.
guest out_eventfd \mode
        mov     dx, 0x510
1:      out     dx, al
        again

# One interrupt ends each HLT. The handler only returns: the VMM has set the interrupt controller to
# acknowledge by itself.
guest hlt_kernel \mode
1:      sti
        hlt
        cli
        again
guest interrupt \mode
        \iret

guest hlt_user \mode
1:      hlt
        again

# Access the microcode's update level: KVM keeps one for every guest, and ignores writes.
guest rdmsr \mode
        mov     ecx, 0x8b
1:      rdmsr
        again

guest wrmsr \mode
        mov     ecx, 0x8b
        xor     eax, eax
        xor     edx, edx
1:      wrmsr
        again

# Write the deadline of a timer that is not in deadline mode.
guest wrmsr_fast \mode
        mov     ecx, 0x6e0
        xor     eax, eax
        xor     edx, edx
1:      wrmsr
        again

# Flip CR0.AM, which belongs to the host, and has no effect at CPL 0.
guest cr_write \mode
        mov     \a, cr0
1:      xor     eax, 0x40000
        mov     cr0, \a
        again

# Call KVM_HC_VAPIC_POLL_IRQ, which does nothing.
guest vmcall \mode
1:      mov     eax, 1
        vmcall
        again

guest vmmcall \mode
1:      mov     eax, 1
        vmmcall
        again

guest invd \mode
1:      invd
        again

guest wbinvd \mode
1:      wbinvd
        again

guest spin \mode
1:      again

# Write one byte in each of edi pages.
guest touch \mode
1:      mov     byte ptr [\s], 1
        add     esi, 0x1000
        again

# Read one byte from each of edi pages.
guest look \mode
1:      mov     al, byte ptr [\s]
        add     esi, 0x1000
        again

# Access a device's registers in two pages: write one, read two.
guest device \mode
1:      mov     byte ptr [\s], al
        mov     al, byte ptr [\s + 0x10]
        mov     al, byte ptr [\s + 0x1010]
        again

# Access debug registers. KVM lets the guest do so without an exit, up to the next exit: CPUID's.
guest debug \mode
1:      mov     eax, 0x400
        mov     dr7, \a
        xor     eax, eax
        cpuid
        mov     \a, dr6
        xor     eax, eax
        cpuid
        again
.endm

.section .rodata.tiny_guests, "a"
.balign 16
.global tiny_code
tiny_code:

.code64
guests 64, rax, rsi, iretq

# Execute CPUID with all of RAX to RDX set before and stored after. An entry is four numbers of 64
# bits in, four out.
guest query 64
1:      mov     rax, [rsi]
        mov     rbx, [rsi + 8]
        mov     rcx, [rsi + 16]
        mov     rdx, [rsi + 24]
        cpuid
        mov     [rsi + 32], rax
        mov     [rsi + 40], rbx
        mov     [rsi + 48], rcx
        mov     [rsi + 56], rdx
        add     rsi, 64
        again

# Call each of edi pages, which begin with RET.
guest call 64
1:      call    rsi
        add     esi, 0x1000
        again

# Handle an exception, without and with an error code: continue at rbx.
guest resume 64
        mov     [rsp], rbx
        iretq
guest resume_error 64
        add     rsp, 8
        mov     [rsp], rbx
        iretq

# Execute an instruction that may fault, and continue behind it.
.macro may_fault instruction:vararg
        lea     rbx, [rip + 9f]
        \instruction
9:
.endm

# Execute an undefined instruction.
guest undefined 64
1:      may_fault ud2
        again

# Exit for more reasons than a ledger holds histograms in itself. The first half is of both vendors.
.macro varied_reasons
        xor     eax, eax
        xor     ecx, ecx
        cpuid
        invd
        wbinvd
        hlt
        mov     dx, 0x3f0
        out     dx, al
        mov     ecx, 0x8b
        rdmsr
        wrmsr
        mov     rax, cr0
        xor     eax, 0x40000
        mov     cr0, rax
        may_fault ud2
        may_fault rdpmc
.endm

# Each of VMX's own instructions exits before KVM finds that the guest is no hypervisor.
guest varied_vmx 64
1:      varied_reasons
        mov     eax, 1
        vmcall
        may_fault vmclear [rsi]
        may_fault vmlaunch
        may_fault vmptrld [rsi]
        may_fault vmptrst [rsi]
        may_fault vmread rax, rcx
        may_fault vmresume
        may_fault vmwrite rcx, rax
        may_fault vmxoff
        may_fault vmxon [rsi]
        may_fault invept rax, [rsi]
        may_fault invvpid rax, [rsi]
        mov     rax, dr6
        again

# So does each of SVM's, and each control and debug register has reasons of its own. KVM stops
# intercepting debug registers up to the next exit, CPUID's.
.macro with_exit instruction:vararg
        xor     eax, eax
        \instruction
        xor     eax, eax
        cpuid
.endm
guest varied_svm 64
1:      varied_reasons
        mov     eax, 1
        vmmcall
        may_fault vmrun
        may_fault vmload
        may_fault vmsave
        may_fault stgi
        may_fault clgi
        may_fault skinit
        may_fault invlpga
        may_fault rsm
        mov     eax, 0x20
        mov     cr4, rax
        xor     eax, eax
        mov     cr8, rax
        with_exit mov rax, dr0
        with_exit mov rax, dr1
        with_exit mov rax, dr2
        with_exit mov rax, dr3
        with_exit mov rax, dr4
        with_exit mov rax, dr5
        with_exit mov rax, dr6
        with_exit mov rax, dr7
        with_exit mov dr0, rax
        with_exit mov dr1, rax
        with_exit mov dr2, rax
        with_exit mov dr3, rax
        with_exit mov dr4, rax
        with_exit mov dr5, rax
        with_exit mov dr6, rax
        with_exit mov dr7, rax
        again

# Move the guest's own code: rbx becomes the entry of the page directory at rsi, which maps it. The
# CPU continues with its cached translation, up to the exit of CPUID.
guest moved 64
        mov     [rsi], rbx
        cpuid
        out     0xf4, al
        ud2

# A hypervisor on SVM that runs a guest once; rax is the address of its VMCB.
guest vmrun 64
        vmrun   rax
        out     0xf4, al
        ud2

# Its guest, which executes CPUID once. VMMCALL tells the hypervisor that it has ended.
guest inner 64
        cpuid
        vmmcall
        ud2

.code16
guests 16, eax, esi, iret

# Guests of 64-bit mode only: see runs_in().
guest call 16
guest undefined 16
guest varied_vmx 16
guest varied_svm 16
        ud2

guest query 16
1:      mov     eax, [esi]
        mov     ebx, [esi + 8]
        mov     ecx, [esi + 16]
        mov     edx, [esi + 24]
        cpuid
        mov     [esi + 32], eax
        mov     [esi + 40], ebx
        mov     [esi + 48], ecx
        mov     [esi + 56], edx
        add     esi, 64
        again

.global tiny_code_end
tiny_code_end:
.code64
.text
