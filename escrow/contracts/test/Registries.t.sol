// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IIdentityRegistry, IReputationRegistry} from "../src/IRegistries.sol";
import {Base} from "./Base.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {vm} from "./Vm.sol";

interface IToken721 {
    function name() external view returns (string memory);
    function symbol() external view returns (string memory);
    function ownerOf(uint256 tokenId) external view returns (address);
    function tokenURI(uint256 tokenId) external view returns (string memory);
    function approve(address to, uint256 tokenId) external;
    function setApprovalForAll(address operator, bool approved) external;
    function transferFrom(address from, address to, uint256 tokenId) external;
}

contract RegistriesTest is Base {
    IIdentityRegistry private _who;
    IToken721 private _token;
    IReputationRegistry private _said;

    function setUp() public override {
        super.setUp();
        _who = IIdentityRegistry(create("IdentityRegistry", ""));
        _token = IToken721(address(_who));
        _said = IReputationRegistry(create("ReputationRegistry", abi.encode(address(_who))));
    }

    function register() private returns (uint256) {
        vm.prank(seller);
        return _who.register("https://agent.example/file.json");
    }

    function walletDigest(uint256 id, address wallet, address owner, uint256 deadline) private view returns (bytes32) {
        bytes32 separator = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("ERC8004IdentityRegistry"),
                keccak256("1"),
                block.chainid,
                address(_who)
            )
        );
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256("AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)"),
                id,
                wallet,
                owner,
                deadline
            )
        );
        return keccak256(abi.encodePacked(hex"1901", separator, structHash));
    }

    // -------------------------------------------------------------------------------- identity

    function test_selectorsAreThoseOfTheStandard() public pure {
        vm.assertTrue(bytes4(keccak256("register(string,(string,bytes)[])")) == 0x8ea42286, "register 1");
        vm.assertTrue(bytes4(keccak256("register(string)")) == 0xf2c298be, "register 2");
        vm.assertTrue(bytes4(keccak256("register()")) == 0x1aa3a008, "register 3");
        vm.assertTrue(IIdentityRegistry.setAgentURI.selector == 0x0af28bd3, "setAgentURI");
        vm.assertTrue(IIdentityRegistry.setAgentWallet.selector == 0x2d1ef5ae, "setAgentWallet");
        vm.assertTrue(IReputationRegistry.giveFeedback.selector == 0x3c036a7e, "giveFeedback");
    }

    function test_register() public {
        vm.expectEmit(true, true, true, true, address(_who));
        emit IIdentityRegistry.Registered(0, "https://agent.example/file.json", seller);
        uint256 first = register();
        vm.assertEq(_token.name(), "AgentIdentity", "name");
        vm.assertEq(_token.symbol(), "AGENT", "symbol");
        vm.assertEq(_token.ownerOf(first), seller, "owner");
        vm.assertEq(_token.tokenURI(first), "https://agent.example/file.json", "file");
        vm.assertEq(_who.getAgentWallet(first), seller, "paid to its owner");
        IIdentityRegistry.MetadataEntry[] memory entries = new IIdentityRegistry.MetadataEntry[](1);
        entries[0] = IIdentityRegistry.MetadataEntry("colour", hex"07");
        vm.prank(buyer);
        uint256 second = _who.register("", entries);
        vm.assertEq(second, first + 1, "next");
        vm.assertEq(uint256(uint8(_who.getMetadata(second, "colour")[0])), 7, "metadata");
        entries[0].metadataKey = "agentWallet";
        vm.expectPartialRevert(IIdentityRegistry.ReservedKey.selector);
        _who.register("", entries);
        vm.prank(buyer);
        vm.assertEq(_who.register(), 2, "without anything");
    }

    function test_onlyItsOwnerAndWhomHeApprovedChangeAnAgent() public {
        uint256 id = register();
        vm.startPrank(stranger);
        vm.expectPartialRevert(IIdentityRegistry.NotAuthorized.selector);
        _who.setAgentURI(id, "x");
        vm.expectPartialRevert(IIdentityRegistry.NotAuthorized.selector);
        _who.setMetadata(id, "x", "");
        vm.expectPartialRevert(IIdentityRegistry.NotAuthorized.selector);
        _who.unsetAgentWallet(id);
        vm.expectPartialRevert(IIdentityRegistry.NotAuthorized.selector);
        _who.setAgentWallet(id, stranger, START, "");
        vm.stopPrank();
        vm.prank(seller);
        _token.approve(stranger, id);
        vm.startPrank(stranger);
        _who.setAgentURI(id, "y");
        _who.setMetadata(id, "x", hex"01");
        vm.expectPartialRevert(IIdentityRegistry.ReservedKey.selector);
        _who.setMetadata(id, "agentWallet", hex"01");
        vm.stopPrank();
        vm.assertEq(_token.tokenURI(id), "y", "file");
    }

    function test_aWalletAgreesByItsOwnSignature() public {
        uint256 id = register();
        uint256 deadline = START + 300;
        bytes memory signature = sign(ARBITER_KEY, walletDigest(id, arbiter, seller, deadline));
        vm.startPrank(seller);
        vm.expectPartialRevert(IIdentityRegistry.InvalidWalletSignature.selector);
        _who.setAgentWallet(id, stranger, deadline, signature);
        vm.expectPartialRevert(IIdentityRegistry.InvalidWalletSignature.selector);
        _who.setAgentWallet(id, arbiter, deadline - 1, signature);
        vm.expectPartialRevert(IIdentityRegistry.BadDeadline.selector);
        _who.setAgentWallet(id, arbiter, START - 1, signature);
        vm.expectPartialRevert(IIdentityRegistry.BadDeadline.selector);
        _who.setAgentWallet(id, arbiter, START + 301, signature);
        vm.expectPartialRevert(IIdentityRegistry.BadWallet.selector);
        _who.setAgentWallet(id, address(0), deadline, signature);
        _who.setAgentWallet(id, arbiter, deadline, signature);
        vm.assertEq(_who.getAgentWallet(id), arbiter, "linked");

        Wallet wallet = new Wallet(arbiter);
        signature = sign(ARBITER_KEY, walletDigest(id, address(wallet), seller, deadline));
        _who.setAgentWallet(id, address(wallet), deadline, signature);
        vm.assertEq(_who.getAgentWallet(id), address(wallet), "a contract's by ERC-1271");
        _who.unsetAgentWallet(id);
        vm.assertEq(_who.getAgentWallet(id), address(0), "unset");
        vm.stopPrank();
    }

    function test_anAgentThatChangesHandsHasNoWallet() public {
        uint256 id = register();
        vm.prank(seller);
        _token.transferFrom(seller, buyer, id);
        vm.assertEq(_who.getAgentWallet(id), address(0), "cleared");
    }

    // ------------------------------------------------------------------------------ reputation

    function say(address who, uint256 id, int128 value, uint8 decimals, string memory tag) private {
        vm.prank(who);
        _said.giveFeedback(id, value, decimals, tag, "", "", "data:,", keccak256("file"));
    }

    function test_feedbackOfOthersOnly() public {
        uint256 id = register();
        vm.assertEq(_said.getIdentityRegistry(), address(_who), "registry");
        vm.expectPartialRevert(IReputationRegistry.OwnFeedback.selector);
        say(seller, id, 1, 0, "");
        vm.prank(seller);
        _token.setApprovalForAll(stranger, true);
        vm.expectPartialRevert(IReputationRegistry.OwnFeedback.selector);
        say(stranger, id, 1, 0, "");
        vm.expectRevert(); // No such agent.
        say(buyer, id + 1, 1, 0, "");
        vm.expectPartialRevert(IReputationRegistry.BadValue.selector);
        say(buyer, id, 1, 19, "");
        vm.expectPartialRevert(IReputationRegistry.BadValue.selector);
        say(buyer, id, 1e38 + 1, 0, "");
        vm.expectEmit(true, true, true, true, address(_said));
        emit IReputationRegistry.NewFeedback(id, buyer, 1, 80, 0, "speed", "speed", "", "", "data:,", keccak256("file"));
        say(buyer, id, 80, 0, "speed");
        vm.assertEq(uint256(_said.getLastIndex(id, buyer)), 1, "index");
        vm.assertEq(_said.getClients(id).length, 1, "clients");
    }

    function test_revokedOnceByItsAuthor() public {
        uint256 id = register();
        say(buyer, id, 80, 0, "");
        vm.expectPartialRevert(IReputationRegistry.NoSuchFeedback.selector);
        vm.prank(stranger);
        _said.revokeFeedback(id, 1);
        vm.startPrank(buyer);
        vm.expectPartialRevert(IReputationRegistry.NoSuchFeedback.selector);
        _said.revokeFeedback(id, 0);
        _said.revokeFeedback(id, 1);
        vm.expectPartialRevert(IReputationRegistry.AlreadyRevoked.selector);
        _said.revokeFeedback(id, 1);
        vm.stopPrank();
        (,,,, bool revoked) = _said.readFeedback(id, buyer, 1);
        vm.assertTrue(revoked, "revoked");
    }

    function test_summaryOfChosenClients() public {
        uint256 id = register();
        say(buyer, id, 80, 0, "speed");
        say(buyer, id, 995, 1, "speed");
        say(arbiter, id, 60, 0, "speed");
        say(arbiter, id, 1, 0, "price");
        address[] memory chosen = new address[](0);
        vm.expectRevert("clientAddresses required");
        _said.getSummary(id, chosen, "", "");
        chosen = new address[](2);
        (chosen[0], chosen[1]) = (buyer, arbiter);
        (uint64 count, int128 mean, uint8 decimals) = _said.getSummary(id, chosen, "speed", "");
        vm.assertEq(uint256(count), 3, "count");
        vm.assertEq(int256(mean), 79, "80 + 99.5 + 60 in thirds, in the decimals of most");
        vm.assertEq(uint256(decimals), 0, "decimals");
        (address[] memory clients, uint64[] memory indexes,,,,,) = _said.readAllFeedback(id, new address[](0), "", "", true);
        vm.assertEq(clients.length, 4, "all");
        vm.assertEq(uint256(indexes[1]), 2, "index");
        vm.prank(buyer);
        _said.revokeFeedback(id, 1);
        (count,,) = _said.getSummary(id, chosen, "", "");
        vm.assertEq(uint256(count), 3, "without the revoked");
        (count, mean, decimals) = _said.getSummary(id, chosen, "nothing", "");
        vm.assertEq(uint256(count), 0, "none");
    }

    function test_responses() public {
        uint256 id = register();
        say(buyer, id, 80, 0, "");
        say(arbiter, id, 80, 0, "");
        vm.expectPartialRevert(IReputationRegistry.NoSuchFeedback.selector);
        _said.appendResponse(id, buyer, 2, "", "");
        for (uint256 i = 0; i < 2; ++i) {
            vm.prank(seller);
            _said.appendResponse(id, buyer, 1, "data:,sorry", "");
        }
        vm.prank(stranger);
        _said.appendResponse(id, arbiter, 1, "data:,me", "");
        address[] memory anybody = new address[](0);
        address[] memory seller_ = new address[](1);
        seller_[0] = seller;
        vm.assertEq(uint256(_said.getResponseCount(id, buyer, 1, anybody)), 2, "to this entry");
        vm.assertEq(uint256(_said.getResponseCount(id, buyer, 0, seller_)), 2, "to this client");
        vm.assertEq(uint256(_said.getResponseCount(id, address(0), 0, anybody)), 3, "in all");
        vm.assertEq(uint256(_said.getResponseCount(id, arbiter, 1, seller_)), 0, "of this responder");
    }
}
